//! How often a whole request allocates that is not kept for `/explain`: client, sidecar, mutual TLS, sidecar, program, and back. In a process of its own,
//! whose every thread is counted; those that are no sidecar's stand still meanwhile, or allocate nothing.

mod mesh;

use std::alloc::System;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use sheetbend_control_plane_client::admin_http;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

use self::mesh::Mesh;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nwell\n";

/// A program that answers every head it hears, and allocates only when it is connected to.
fn program() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut heard = [0; 4096];
                let mut length = 0;
                while let Ok(more @ 1..) = stream.read(&mut heard[length..]) {
                    length += more;
                    if heard[..length].ends_with(b"\r\n\r\n") {
                        length = 0;
                        stream.write_all(ANSWER).unwrap();
                    }
                }
            });
        }
    });
    address
}

/// What a browser or a library asks for, over a connection that stays.
const REQUEST: &[u8] = b"GET /cart/items?page=2 HTTP/1.1\r\nHost: web\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n";

/// Asks once; what came where that is not the program's answer. Allocates nothing before that.
fn ask(stream: &mut TcpStream) -> Result<(), String> {
    stream.write_all(REQUEST).unwrap();
    let mut heard = [0; 4096];
    let mut length = 0;
    while !heard[..length].ends_with(b"well\n") {
        match stream.read(&mut heard[length..]) {
            Ok(more @ 1..) => length += more,
            // Of a process that was stopped and goes on, with a time-out on the socket: signal(7).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another's answer, and no more of it.
            _ => return Err(heard[..length].escape_ascii().to_string()),
        }
    }
    match heard.starts_with(b"HTTP/1.1 200 OK\r\n") {
        true => Ok(()),
        false => Err(heard[..length].escape_ascii().to_string()),
    }
}

/// A connection over which the program answers.
fn connected(proxy: SocketAddr) -> TcpStream {
    let deadline = Instant::now() + mesh::PATIENCE;
    loop {
        let mut stream = TcpStream::connect(proxy).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let asked = ask(&mut stream);
        if asked.is_ok() {
            stream.set_read_timeout(Some(mesh::PATIENCE)).unwrap();
            return stream;
        }
        assert!(Instant::now() < deadline, "the program does not answer: {asked:?}");
    }
}

/// Allocations of one request, in the batch that had the fewest: now and then a queue grows.
fn measured() -> u64 {
    const BATCHES: usize = 30;
    const BATCH: usize = 100;
    let app = program();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut client, _running) = runtime.block_on(async {
        let mesh = Mesh::start().await;
        let server = mesh.sidecar("web", Some(app)).await;
        let caller = mesh.sidecar("caller", None).await;
        // What is told on `/explain` allocates: here, nothing is.
        for sidecar in [&server, &caller] {
            let admin = format!("http://{}", sidecar.admin());
            admin_http::post(&admin, "/explain?keep_one_in=0", "").await.unwrap();
        }
        let proxy = caller.explicit().unwrap();
        let client = tokio::task::spawn_blocking(move || connected(proxy)).await.unwrap();
        (client, (mesh, server, caller))
    });
    // Nobody polls the runtime from here on: only the two workers run.
    let batches = (0..BATCHES).map(|_| {
        let region = Region::new(COUNTING);
        (0..BATCH).for_each(|_| ask(&mut client).unwrap());
        let counted = region.change();
        counted.allocations + counted.reallocations
    });
    let fewest = batches.min().unwrap();
    // To the nearest: what comes once in a few dozen requests is none of each.
    ((fewest + BATCH / 2) / BATCH) as u64
}

#[test]
fn a_whole_request_allocates_no_more_than_is_written_down() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/allocations.txt");
    let written = std::fs::read_to_string(path).unwrap();
    let written = written.lines().find_map(|line| line.strip_prefix("request ")).unwrap();
    assert_eq!(measured(), written.parse::<u64>().unwrap(), "left: measured now, right: {path}");
}
