//! How many there are: a line each way.
//!
//! `count NAME` and `take NAME` are answered with `ok NUMBER` or `no REASON`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::Error;

type Shelves = Arc<Mutex<BTreeMap<String, u64>>>;

pub(crate) async fn serve(port: u16) -> Result<(), Error> {
    let shelves = Shelves::default();
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(talk(stream, shelves.clone()));
    }
}

async fn talk(stream: TcpStream, shelves: Shelves) -> Result<(), std::io::Error> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = answer(&line, &shelves);
        write.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

fn answer(line: &str, shelves: &Shelves) -> String {
    let Some((verb, name)) = line.split_once(' ') else { return "no: say `count NAME` or `take NAME`\n".into() };
    let mut shelves = shelves.lock().expect("no panic holds this lock");
    let left = shelves.entry(name.chars().take(32).collect()).or_insert(1000);
    match verb {
        "count" => {}
        // An empty shelf is filled at once: the shop never closes.
        "take" => *left = left.checked_sub(1).unwrap_or(1000),
        _ => return "no: say `count NAME` or `take NAME`\n".into(),
    }
    format!("ok {left}\n")
}
