//! The listener, on loopback.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sheetbend_proxy::listen::{self, BindError, bind};
use sheetbend_proxy::rewind::Rewind;
use sheetbend_proxy::tcp::Abort;
use tokio::net::TcpStream;
use tokio::time::timeout;

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_port_in_use_says_how_to_find_who_uses_it() {
    let first = bind(addr("127.0.0.1:0")).unwrap();
    let error = bind(first.local_addr()).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)));
    let port = first.local_addr().port();
    assert_eq!(error.to_string(), format!("127.0.0.1:{port} is in use; `ss -ltnp 'sport = :{port}'` shows by whom"));
}

#[tokio::test]
async fn an_address_of_nobody_is_told_from_other_trouble() {
    let error = bind(addr("192.0.2.1:0")).unwrap_err();
    assert!(matches!(error, BindError::NoSuchAddress(_)), "{error}");
}

#[tokio::test]
async fn a_port_can_be_taken_again_at_once() {
    let mut listener = bind(addr("127.0.0.1:0")).unwrap();
    let at = listener.local_addr();
    let client = TcpStream::connect(at).await.unwrap();
    drop(listener.accept().await); // Our side closes first, and so is the one in TIME_WAIT.
    drop((listener, client));
    // A child that another test starts at this moment holds a copy until it has become another program; TIME_WAIT is 60 s.
    let again = async {
        while bind(at).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(30), again).await.unwrap();
}

#[tokio::test]
async fn every_accepted_connection_has_its_options() {
    let mut listener = bind(addr("127.0.0.1:0")).unwrap();
    let _client = TcpStream::connect(listener.local_addr()).await.unwrap();
    let stream = listener.accept().await.register().unwrap();
    let socket = socket2::SockRef::from(&stream);
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(10));
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
    assert_eq!(socket.tcp_user_timeout().unwrap(), None);
    let again = socket.try_clone().unwrap();
    // Through whatever a connection is wrapped in.
    let wrapped: Box<dyn Abort> = Box::new(Rewind::new("read before", stream));
    wrapped.expect_steady_reader();
    assert_eq!(again.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
}

#[tokio::test]
async fn both_families_reach_a_listener_on_every_address() {
    let Ok(mut listener) = bind(addr("[::]:0")) else {
        eprintln!("left out: this machine has no IPv6");
        return;
    };
    let port = listener.local_addr().port();
    let no_v6_loopback = std::net::TcpListener::bind("[::1]:0").is_err();
    for ip in ["127.0.0.1", "::1"] {
        if ip == "::1" && no_v6_loopback {
            eprintln!("left out: this machine has no [::1]");
            continue;
        }
        let client = TcpStream::connect((ip, port)).await.unwrap();
        let accepted = listener.accept().await;
        assert_eq!(accepted.peer.port(), client.local_addr().unwrap().port());
        assert_eq!(accepted.peer.ip().to_canonical().to_string(), ip);
        assert_eq!(listen::original_destination(&accepted.stream).unwrap(), None, "nobody redirected this");
    }
}

/// Whether this is a process of its own for the test of this name, whose limits are nobody else's. If not, one has passed.
fn is_alone(test: &str) -> bool {
    const CHILD: &str = "SHEETBEND_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    assert!(alone.args(["--exact", test, "--nocapture"]).env(CHILD, "1").status().unwrap().success());
    false
}

#[test]
fn with_no_descriptor_left_clients_are_closed_and_counted_and_later_ones_served() {
    const NAME: &str = "with_no_descriptor_left_clients_are_closed_and_counted_and_later_ones_served";
    if !is_alone(NAME) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let turned_away = Arc::new(AtomicU64::new(0));
        let counter = metrics::Counter::from_arc(Arc::clone(&turned_away));
        let mut listener = bind(addr("127.0.0.1:0")).unwrap().counting(counter);
        let at = listener.local_addr();
        let mut clients: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(at).unwrap()).collect();
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum }).unwrap();
        let files: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();

        let all = async {
            while turned_away.load(Relaxed) < 20 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // All are counted while it still goes on.
        tokio::select! {
            _ = listener.accept() => panic!("there was no descriptor to accept with"),
            all = timeout(Duration::from_secs(30), all) => all.expect("only some were turned away"),
        }
        assert_eq!(turned_away.load(Relaxed), 20);
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "an orderly close, at once");
        }
        drop(files);

        let client = std::net::TcpStream::connect(at).unwrap();
        let accepted = timeout(Duration::from_secs(10), listener.accept()).await.unwrap();
        assert_eq!(accepted.peer, client.local_addr().unwrap());
    });
}

/// A growth of the table while other threads run would stall whoever opens a descriptor.
#[test]
fn a_table_with_room_for_many_descriptors_is_there_before_the_first_connection() {
    const NAME: &str = "a_table_with_room_for_many_descriptors_is_there_before_the_first_connection";
    if !is_alone(NAME) {
        return;
    }
    let room = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        size.trim().parse::<u64>().unwrap()
    };
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = maximum.unwrap_or(4096).min(4096);
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum }).unwrap();
    assert!(room() < limit, "it is small by itself");
    sheetbend_proxy::listen::make_room_for_descriptors();
    assert!(room() >= limit, "as large as the limit allows: {}", room());
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), open, "and nothing of it is taken");
}
