use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;
use sheetbend_control_plane_client::model::ServiceName;

use super::*;
use crate::telemetry::{AccessLogSettings, Settings};

struct Proxy {
    address: String,
    ready: Arc<AtomicBool>,
}

fn state(ready: &Arc<AtomicBool>) -> AdminState {
    let telemetry = Telemetry::new(Settings {
        identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
        service: ServiceName { service: "web".into(), namespace: "default".into() },
        access_log: AccessLogSettings::default(),
    });
    let filter = Arc::new(Mutex::new("info".to_string()));
    let (is_ready, current) = (Arc::clone(ready), Arc::clone(&filter));
    AdminState {
        telemetry,
        ready: Box::new(move || match is_ready.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("no certificate yet".into()),
        }),
        measure: Box::new(|| ()),
        config_dump: Box::new(|| json!({"listen": "127.0.0.1:1"})),
        clusters: Box::new(|| json!([])),
        breakers: Box::new(|| json!({"endpoints": []})),
        watch: Box::new(|| Ok((admin_http::Event::encode("breakers", &json!({})), mpsc::channel(1).1))),
        operate: Box::new(|asked| match asked.path.as_str() {
            "/breakers/10.0.0.1:80/eject" => Ok(json!({"state": "Ejected"})),
            _ => Err((StatusCode::CONFLICT, "too few would be left".to_string())),
        }),
        preview: Box::new(|described| match described {
            b"{}" => Ok(json!({ "decided": true })),
            _ => Err((StatusCode::BAD_REQUEST, "not a request".to_string())),
        }),
        certs: Box::new(|| json!({"chain": []})),
        server_info: Box::new(|| json!({"version": "0"})),
        log_filter: Box::new(move || current.lock().unwrap().clone()),
        set_log_filter: Box::new(move |new| match new {
            "debug" => {
                *filter.lock().unwrap() = new.to_string();
                Ok(())
            }
            other => Err(format!("`{other}` is no level")),
        }),
    }
}

async fn started(scope: Scope) -> Proxy {
    let ready = Arc::new(AtomicBool::new(false));
    let state = state(&ready);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(Admin::serve(listener, Arc::new(state), scope));
    Proxy { address, ready }
}

/// Asked again where the machine takes longer than an operator's tools wait.
async fn get(proxy: &Proxy, path: &str) -> Result<String, String> {
    let mut tries = 10;
    loop {
        tries -= 1;
        match admin_http::get(&proxy.address, path).await {
            Err(admin_http::AskError::Timeout(_)) if tries > 0 => {}
            answer => return answer.map(|body| String::from_utf8_lossy(&body).into_owned()).map_err(|e| e.to_string()),
        }
    }
}

async fn post(proxy: &Proxy, path: &str, body: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(&proxy.address).await.unwrap();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}", body.len());
    socket.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await.unwrap();
    let mut said = String::new();
    socket.read_to_string(&mut said).await.unwrap();
    said
}

#[tokio::test]
async fn every_path_of_the_admin_port_answers() {
    let proxy = started(Scope::Everything).await;
    for path in
        ["/live", "/metrics", "/stats/prometheus", "/config_dump", "/clusters", "/certs", "/logging", "/server_info"]
    {
        assert!(get(&proxy, path).await.is_ok(), "{path}");
    }
    assert!(get(&proxy, "/metrics").await.unwrap().contains("# TYPE sheetbend_connections_total counter"));
    for (format, begins) in
        [("json", "{"), ("dot", "digraph"), ("mermaid", "flowchart"), ("table", "No traffic"), ("html", "<!doctype")]
    {
        assert!(get(&proxy, &format!("/graph?format={format}")).await.unwrap().starts_with(begins), "{format}");
    }
    assert!(get(&proxy, "/graph?format=svg").await.unwrap_err().contains("400"));
    assert!(get(&proxy, "/nothing").await.unwrap_err().contains("/config_dump"));
}

#[tokio::test]
async fn readiness_says_what_it_waits_for() {
    let proxy = started(Scope::Health).await;
    assert!(get(&proxy, "/ready").await.unwrap_err().contains("no certificate yet"));
    proxy.ready.store(true, Ordering::Relaxed);
    assert_eq!(get(&proxy, "/ready").await.unwrap(), "ready\n");
}

#[tokio::test]
async fn others_see_health_and_metrics_alone() {
    let proxy = started(Scope::Health).await;
    assert!(get(&proxy, "/metrics").await.is_ok());
    for path in ["/config_dump", "/clusters", "/certs", "/logging", "/server_info", "/graph", "/"] {
        assert!(get(&proxy, path).await.unwrap_err().contains("404"), "{path}");
    }
    assert!(post(&proxy, "/logging", "debug").await.starts_with("HTTP/1.1 403"));
}

#[tokio::test(start_paused = true)]
async fn metrics_are_rendered_once_a_second_however_many_others_ask() {
    let times = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&times);
    let measure = Box::new(move || _ = counted.fetch_add(1, Ordering::Relaxed));
    let state = AdminState { measure, ..state(&Arc::default()) };
    let rendered = Rendered::default();
    let path = "/metrics".to_string();
    let asked = Asked { method: Method::GET, path, query: None, accept: None, body: Bytes::new() };
    let ask = |scope| answer(&state, scope, &rendered, &asked).body;
    let first = ask(Scope::Health);
    assert_eq!(ask(Scope::Health), first);
    assert_eq!(times.load(Ordering::Relaxed), 1);
    tokio::time::advance(FRESH).await;
    ask(Scope::Health);
    assert_eq!(times.load(Ordering::Relaxed), 2);
    ask(Scope::Everything);
    assert_eq!(times.load(Ordering::Relaxed), 3, "the operator sees what is");
}

#[tokio::test]
async fn the_log_level_is_changed_by_a_post_and_a_wrong_one_is_refused() {
    let proxy = started(Scope::Everything).await;
    assert!(post(&proxy, "/logging", "loud").await.contains("`loud` is no level"));
    assert!(post(&proxy, "/logging", "").await.starts_with("HTTP/1.1 400"));
    assert!(post(&proxy, "/logging?level=debug", "").await.starts_with("HTTP/1.1 200"));
    assert_eq!(get(&proxy, "/logging").await.unwrap(), "debug\n");
    assert!(post(&proxy, "/clusters", "").await.starts_with("HTTP/1.1 405"));
}

#[tokio::test]
async fn an_endpoint_is_ejected_by_a_post_of_this_machine_alone() {
    let proxy = started(Scope::Everything).await;
    let said = post(&proxy, "/breakers/10.0.0.1:80/eject", "").await;
    assert!(said.starts_with("HTTP/1.1 200") && said.contains("Ejected"), "{said}");
    let said = post(&proxy, "/breakers/10.0.0.2:80/eject", "").await;
    assert!(said.starts_with("HTTP/1.1 409") && said.ends_with("too few would be left\n"), "{said}");
    assert!(get(&proxy, "/breakers/10.0.0.1:80/eject").await.unwrap_err().contains("405"));
    assert!(post(&proxy, "/breakers", "").await.starts_with("HTTP/1.1 405"));
    let health = started(Scope::Health).await;
    assert!(post(&health, "/breakers/10.0.0.1:80/eject", "").await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn whoever_wants_events_gets_them() {
    let proxy = started(Scope::Everything).await;
    for path in ["/breakers", "/breakers?watch"] {
        let first = admin_http::watch(&proxy.address, path).await.unwrap().next().await.unwrap();
        assert_eq!((first.name.as_str(), first.data.as_str()), ("breakers", "{}"), "{path}");
    }
    assert_eq!(get(&proxy, "/breakers?watch").await.unwrap(), "event: breakers\ndata: {}\n\n");
    assert!(get(&proxy, "/breakers").await.unwrap().starts_with('{'));
}
