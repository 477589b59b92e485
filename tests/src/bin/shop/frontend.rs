//! The page that customers see.

use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use crate::Error;
use crate::call::{Http, tunnel};
use crate::proto::ListRequest;
use crate::proto::catalog_client::CatalogClient;

struct Frontend {
    http: Http,
    catalog: CatalogClient<Channel>,
}

pub(crate) async fn serve(port: u16, catalog: &str) -> Result<(), Error> {
    let target = catalog.to_string();
    // gRPC clients ask their proxy for a tunnel, whatever the scheme.
    let connector = tower::service_fn(move |_| {
        let target = target.clone();
        async move { tunnel("grpc_proxy", &target).await.map(TokioIo::new) }
    });
    let channel = Endpoint::new(format!("http://{catalog}"))?.connect_with_connector_lazy(connector);
    let frontend = Frontend { http: Http::default(), catalog: CatalogClient::new(channel) };
    crate::serve::http(port, frontend, answer).await
}

async fn answer(
    frontend: Arc<Frontend>,
    method: Method,
    path: String,
    body: Bytes,
) -> Result<(StatusCode, String), Error> {
    match (method, path.as_str()) {
        (Method::GET, "/") => page(&frontend).await,
        (Method::POST, "/checkout") => {
            let what = String::from_utf8_lossy(&body);
            let (status, text) = frontend.http.call(Method::POST, "http://cart/checkout", &what).await?;
            Ok((status, String::from_utf8_lossy(&text).into_owned()))
        }
        _ => Ok((StatusCode::NOT_FOUND, "no such page\n".into())),
    }
}

async fn page(frontend: &Frontend) -> Result<(StatusCode, String), Error> {
    let mut page = String::from("The knot shop\n");
    let mut articles = frontend.catalog.clone().list(ListRequest {}).await?.into_inner();
    while let Some(article) = articles.message().await? {
        let (euros, cents) = (article.cents / 100, article.cents % 100);
        writeln!(page, "{:<12} {euros:>3}.{cents:02} {:>5} left", article.name, article.in_stock)?;
    }
    let (status, cart) = frontend.http.call(Method::GET, "http://cart/", "").await?;
    writeln!(page, "In your cart: {}", String::from_utf8_lossy(&cart).trim())?;
    Ok((status, page))
}
