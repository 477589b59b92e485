//! The parts of the shop, in the order in which they need each other.

use serde::Deserialize;
use sheetbend_tests::{Process, free_port};

use crate::mesh::Mesh;

/// Everything that runs beside a sidecar.
pub(crate) struct Shop {
    services: Vec<Process>,
    customers: Process,
}

/// How the customers fared.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
}

impl Shop {
    pub(crate) fn open(mesh: &mut Mesh, rate: u32) -> Result<Self, String> {
        let [stock, pay, catalog, cart, frontend] = std::array::from_fn(|_| free_port());
        let [stock_for_catalog, stock_for_cart] = std::array::from_fn(|_| free_port());
        let upstream = |local: u16| ["--upstream".to_string(), format!("{local}:stock:{stock}")];
        let part = |name: &str, port: u16| vec![name.to_string(), "--port".into(), port.to_string()];
        let and = |mut words: Vec<String>, more: &[String]| {
            words.extend_from_slice(more);
            words
        };

        let mut services = vec![
            mesh.run("stock", Some(stock), &[], &part("stock", stock))?,
            mesh.run("pay", Some(pay), &[], &part("pay", pay))?,
        ];
        let words = and(part("catalog", catalog), &["--stock".into(), stock_for_catalog.to_string()]);
        services.push(mesh.run("catalog", Some(catalog), &upstream(stock_for_catalog), &words)?);
        let words = and(part("cart", cart), &["--stock".into(), stock_for_cart.to_string()]);
        let words = and(words, &["--pay".into(), format!("pay:{pay}")]);
        services.push(mesh.run("cart", Some(cart), &upstream(stock_for_cart), &words)?);
        let words = and(part("frontend", frontend), &["--catalog".into(), format!("catalog:{catalog}")]);
        services.push(mesh.run("frontend", Some(frontend), &[], &words)?);
        let words = ["customers".to_string(), "--rate".into(), rate.to_string()];
        let customers = mesh.run("customers", None, &[], &words)?;
        let mut shop = Self { services, customers };
        shop.first_answer()?;
        Ok(shop)
    }

    fn first_answer(&mut self) -> Result<(), String> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while self.tally().answered == 0 {
            self.check()?;
            if std::time::Instant::now() > deadline {
                return Err(format!("no customer was answered\n{}", self.told()));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    }

    /// An error when a part has ended that should not.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        if crate::STOP.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(());
        }
        for part in self.services.iter_mut().chain([&mut self.customers]) {
            if !part.is_alive() {
                return Err(format!("a part of the shop has ended\n{}", part.told()));
            }
        }
        Ok(())
    }

    /// How the customers fare.
    pub(crate) fn tally(&mut self) -> Tally {
        let said = self.customers.stdout();
        said.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default()
    }

    /// Sends the customers home and counts.
    pub(crate) fn close(&mut self) -> Result<Tally, String> {
        let status = self.customers.stop();
        let tally = self.tally();
        if !status.success() || tally.failed > 0 {
            eprintln!("{}", self.told());
        }
        match status.success() {
            true => Ok(tally),
            false => Err(format!("the customers' sidecar ended with {status}")),
        }
    }

    /// Ends every service, callers first.
    pub(crate) fn end(&mut self) {
        for part in self.services.iter_mut().rev() {
            let status = part.stop();
            // A server that SIGTERM ends: `sheetbend run` gives its status as a shell does.
            if !matches!(status.code(), Some(0 | 143)) {
                eprintln!("ended with {status}\n{}", part.told());
            }
        }
    }

    fn told(&self) -> String {
        let parts = self.services.iter().chain([&self.customers]);
        parts.map(Process::told).collect::<Vec<_>>().join("\n")
    }
}
