//! Articles and prices, in gRPC.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::Error;
use crate::call::Lines;
use crate::proto::catalog_server::{Catalog, CatalogServer};
use crate::proto::{Article, ListRequest, LookRequest};

const PRICES: [(&str, u64); 4] = [("bowline", 350), ("clove-hitch", 275), ("reef-knot", 190), ("sheet-bend", 420)];

struct Shelf {
    stock: Lines,
}

pub(crate) async fn serve(port: u16, stock: u16) -> Result<(), Error> {
    let shelf = Shelf { stock: Lines::new(stock) };
    let address = ([127, 0, 0, 1], port).into();
    tonic::transport::Server::builder().add_service(CatalogServer::new(shelf)).serve(address).await?;
    Ok(())
}

impl Shelf {
    async fn article(&self, name: &str, cents: u64) -> Result<Article, Status> {
        let answer = self.stock.ask(&format!("count {name}")).await.map_err(|e| Status::unavailable(e.to_string()))?;
        let in_stock = answer.strip_prefix("ok ").and_then(|n| n.parse().ok());
        let in_stock = in_stock.ok_or_else(|| Status::internal(format!("stock said: {answer}")))?;
        Ok(Article { name: name.into(), cents, in_stock })
    }
}

#[tonic::async_trait]
impl Catalog for Shelf {
    type ListStream = Pin<Box<dyn Stream<Item = Result<Article, Status>> + Send>>;

    async fn look(&self, request: Request<LookRequest>) -> Result<Response<Article>, Status> {
        let name = request.into_inner().name;
        let (name, cents) =
            PRICES.iter().find(|(known, _)| *known == name).ok_or_else(|| Status::not_found("no such article"))?;
        Ok(Response::new(self.article(name, *cents).await?))
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let mut articles = Vec::with_capacity(PRICES.len());
        for (name, cents) in PRICES {
            articles.push(self.article(name, cents).await);
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(articles))))
    }
}
