//! What somebody is about to buy.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Method, StatusCode};

use crate::Error;
use crate::call::{Http2, Lines};

struct Cart {
    sold: AtomicU64,
    pay: Http2,
    stock: Lines,
}

pub(crate) async fn serve(port: u16, pay: String, stock: u16) -> Result<(), Error> {
    let cart = Cart { sold: AtomicU64::new(0), pay: Http2::new(pay), stock: Lines::new(stock) };
    crate::serve::http(port, cart, answer).await
}

async fn answer(cart: Arc<Cart>, method: Method, path: String, body: Bytes) -> Result<(StatusCode, String), Error> {
    match (method, path.as_str()) {
        (Method::GET, "/") => Ok((StatusCode::OK, format!("{} sold so far\n", cart.sold.load(Ordering::Relaxed)))),
        (Method::POST, "/checkout") => checkout(&cart, &String::from_utf8_lossy(&body)).await,
        _ => Ok((StatusCode::NOT_FOUND, "no such page\n".into())),
    }
}

async fn checkout(cart: &Cart, what: &str) -> Result<(StatusCode, String), Error> {
    let taken = cart.stock.ask(&format!("take {what}")).await?;
    if !taken.starts_with("ok") {
        return Ok((StatusCode::CONFLICT, format!("{taken}\n")));
    }
    let (status, receipt) = cart.pay.post("/charge", what).await?;
    if status.is_success() {
        cart.sold.fetch_add(1, Ordering::Relaxed);
    }
    Ok((status, String::from_utf8_lossy(&receipt).into_owned()))
}
