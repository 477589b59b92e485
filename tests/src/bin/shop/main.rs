//! A small shop: real servers that know nothing of a mesh.
//!
//! `frontend` (HTTP/1.1) asks `cart` (HTTP/1.1) and `catalog` (gRPC); `catalog` and `cart` ask `stock` (lines over TCP);
//! `cart` has `pay` (HTTP/2) charge the card; `customers` buy. They find each other as any program under
//! `sheetbend run` does: by `http_proxy` and `grpc_proxy` in their environment, and by a local port for plain TCP.

use clap::{Parser, Subcommand};

mod call;
mod cart;
mod catalog;
mod customers;
mod frontend;
mod pay;
mod serve;
mod stock;

#[allow(missing_docs, clippy::all, unreachable_pub)]
mod proto {
    tonic::include_proto!("shop.v1");
}

/// What a part of the shop may fail with: only printed.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// One part of a small shop.
#[derive(Parser)]
#[command(name = "shop")]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// The page that customers see (HTTP/1.1)
    Frontend {
        #[arg(long)]
        port: u16,
        /// Where the catalog is, `catalog:9000`
        #[arg(long)]
        catalog: String,
    },
    /// What somebody is about to buy (HTTP/1.1)
    Cart {
        #[arg(long)]
        port: u16,
        /// Where pay is, `pay:9000`
        #[arg(long)]
        pay: String,
        /// The local port that leads to stock
        #[arg(long)]
        stock: u16,
    },
    /// Articles and prices (gRPC)
    Catalog {
        #[arg(long)]
        port: u16,
        /// The local port that leads to stock
        #[arg(long)]
        stock: u16,
    },
    /// How many there are (a line each way over TCP)
    Stock {
        #[arg(long)]
        port: u16,
    },
    /// Charges cards (HTTP/2)
    Pay {
        #[arg(long)]
        port: u16,
    },
    /// Buys things until told to stop, and prints how it goes as lines of JSON
    Customers {
        /// Requests a second
        #[arg(long, default_value_t = 50)]
        rate: u32,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    match Cli::parse().part {
        Part::Frontend { port, catalog } => frontend::serve(port, &catalog).await,
        Part::Cart { port, pay, stock } => cart::serve(port, pay, stock).await,
        Part::Catalog { port, stock } => catalog::serve(port, stock).await,
        Part::Stock { port } => stock::serve(port).await,
        Part::Pay { port } => pay::serve(port).await,
        Part::Customers { rate } => customers::buy(rate).await,
    }
}
