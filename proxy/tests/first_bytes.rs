//! Waiting for the first bytes, in time that is paused: what is waited for is exact and takes no time.

use std::time::Duration;

use bytes::BytesMut;
use sheetbend_proxy::client_hello::Hello;
use sheetbend_proxy::detect::Detected;
use sheetbend_proxy::first_bytes::{FirstBytes, Patience, Speaker, read_first, read_hello, who_speaks_first};
use sheetbend_proxy::rewind::Rewind;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::Instant;

async fn first(io: &mut DuplexStream, buf: &mut BytesMut) -> FirstBytes {
    read_first(io, buf, Patience::default()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_gives_the_server_its_chance_after_50_ms() {
    let (_client, mut near) = duplex(1024);
    let start = Instant::now();
    assert_eq!(first(&mut near, &mut BytesMut::new()).await, FirstBytes::ServerFirst);
    assert_eq!(start.elapsed(), Duration::from_millis(50));
}

#[tokio::test(start_paused = true)]
async fn a_client_known_to_speak_first_is_waited_for() {
    let (mut client, mut near) = duplex(1024);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3_000)).await;
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    let patience = Patience { first_byte: None, ..Patience::default() };
    let first = read_first(&mut near, &mut BytesMut::new(), patience).await.unwrap();
    assert_eq!(first, FirstBytes::Detected(Detected::Http1));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_byte_by_byte_is_http_and_none_of_it_is_lost() {
    let (mut client, mut near) = duplex(1024);
    let request = b"POST /orders HTTP/1.1\r\nhost: shop\r\n\r\n";
    tokio::spawn(async move {
        for byte in request {
            client.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let mut buf = BytesMut::new();
    assert_eq!(first(&mut near, &mut buf).await, FirstBytes::Detected(Detected::Http1));
    let mut all = Vec::new();
    Rewind::new(buf, near).read_to_end(&mut all).await.unwrap();
    assert_eq!(all, request);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_or_ends_within_a_request_line_is_opaque() {
    for ends in [false, true] {
        let (mut client, mut near) = duplex(1024);
        client.write_all(b"GET /").await.unwrap();
        if ends {
            client.shutdown().await.unwrap();
        }
        let start = Instant::now();
        let mut buf = BytesMut::new();
        assert_eq!(first(&mut near, &mut buf).await, FirstBytes::Detected(Detected::Opaque));
        assert_eq!(start.elapsed(), if ends { Duration::ZERO } else { Duration::from_secs(10) });
        assert_eq!(&buf[..], b"GET /");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_closes_without_a_byte_has_closed() {
    let (client, mut near) = duplex(1024);
    drop(client);
    assert_eq!(first(&mut near, &mut BytesMut::new()).await, FirstBytes::Closed);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_there_already_count() {
    let (_client, mut near) = duplex(1024);
    let mut buf = BytesMut::from(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]);
    assert_eq!(first(&mut near, &mut buf).await, FirstBytes::Detected(Detected::Http2));
}

#[tokio::test(start_paused = true)]
async fn a_hello_that_never_ends_is_given_up_with_its_bytes_kept() {
    let (mut client, mut near) = duplex(1024);
    client.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc").await.unwrap();
    let mut buf = BytesMut::new();
    let start = Instant::now();
    assert_eq!(read_hello(&mut near, &mut buf, Duration::from_secs(10)).await.unwrap(), Hello::NotParseable);
    assert_eq!((start.elapsed(), buf.len()), (Duration::from_secs(10), 9));
}

#[tokio::test(start_paused = true)]
async fn whoever_speaks_first_decides() {
    for (server_says, client_says, expected) in [
        (Some(&b"220 mail.example ESMTP\r\n"[..]), None, Speaker::Server),
        (None, Some(&b"late"[..]), Speaker::Client),
        (Some(b"both"), Some(b"both"), Speaker::Client),
        (Some(b""), None, Speaker::ServerClosed),
        (None, Some(b""), Speaker::ClientClosed),
    ] {
        let ((mut client, mut near), (mut far, mut server)) = (duplex(1024), duplex(1024));
        for (end, says) in [(&mut client, client_says), (&mut server, server_says)] {
            match says {
                Some(b"") => end.shutdown().await.unwrap(),
                Some(bytes) => end.write_all(bytes).await.unwrap(),
                None => {}
            }
        }
        let (mut up, mut down) = (BytesMut::new(), BytesMut::new());
        let speaker = who_speaks_first(&mut near, &mut up, &mut far, &mut down).await.unwrap();
        assert_eq!(speaker, expected);
        // Whatever was said is in a buffer or still in the connection.
        let kept = if speaker == Speaker::Server { (&down, server_says) } else { (&up, client_says) };
        assert_eq!(&kept.0[..], kept.1.unwrap_or_default());
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_rewound_is_read_first_in_pieces_of_any_size_and_writes_pass_through() {
    for size in [1, 2, 5, 100] {
        let (mut client, near) = duplex(1024);
        client.write_all(b" world").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rewound = Rewind::new(&b"hello"[..], near);
        assert_eq!(rewound.prefix(), b"hello");
        let mut all: Vec<u8> = Vec::new();
        let mut piece = vec![0; size];
        loop {
            match rewound.read(&mut piece).await.unwrap() {
                0 => break,
                read => all.extend(&piece[..read]),
            }
        }
        assert_eq!(all, b"hello world");
        assert!(rewound.prefix().is_empty());
        rewound.write_all(b"back").await.unwrap();
        let mut back = [0; 4];
        client.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"back");
    }
}
