//! Whether traffic is caught: the rules are looked at, then a connection is made that they must catch.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType};
use sheetbend_proxy::listen::original_destination;

use super::rules::Plan;
use super::tools::{self, Tool};
use crate::Failure;

/// Everything happens within this machine, so a second is long.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn check(tool: Option<Tool>, plan: &Plan) -> Result<ExitCode, Failure> {
    tools::need_net_admin()?;
    if Tool::preferred().is_none() {
        return Err(tools::no_tool());
    }
    let tools = tool.map_or(vec![Tool::Nft, Tool::Iptables], |tool| vec![tool]);
    let mut found = None;
    let mut failed = None;
    for tool in tools {
        match tool.differences(plan) {
            Ok(Some(differences)) => found = found.or(Some((tool, differences))),
            Ok(None) => {}
            // Perhaps the rules are the other's, in a kernel that knows that one alone.
            Err(failure) => failed = failed.or(Some(failure)),
        }
    }
    let Some((tool, differences)) = found else {
        return Err(failed.unwrap_or_else(|| {
            Failure::new("no rules of Sheetbend in this network namespace; `sheetbend intercept install` makes them")
        }));
    };
    if !differences.is_empty() {
        return Err(Failure::new(format!(
            "the rules are not those of these flags; `sheetbend intercept install` with the same flags mends them\n{}",
            differences.join("\n")
        )));
    }
    println!("rules: in place, with {tool}");
    for (family, loopback) in [("IPv4", IpAddr::V4(Ipv4Addr::LOCALHOST)), ("IPv6", IpAddr::V6(Ipv6Addr::LOCALHOST))] {
        let result = match own_address(loopback.is_ipv4()) {
            Some(own) => probe(own, loopback, plan)?,
            None => "no address but loopback, nothing to catch".into(),
        };
        println!("outbound {family}: {result}");
    }
    println!("inbound: as the rules say; only another host can try it");
    Ok(ExitCode::SUCCESS)
}

/// Connects to a port of this host on which nobody listens. If anybody answers, it is whom the rules lead to.
fn probe(own: IpAddr, loopback: IpAddr, plan: &Plan) -> Result<String, Failure> {
    if rustix::process::geteuid().as_raw() == plan.proxy_uid {
        return Err(Failure::usage(format!(
            "this runs as the proxy's own user {}, who is never caught",
            plan.proxy_uid
        )));
    }
    let excluded = plan.exclude_outbound_ranges.iter().find(|range| range.contains(&own));
    if let Some(range) = excluded {
        return Ok(format!("not tried, {own} lies in the excluded range {range}"));
    }
    let failed = |error: io::Error| Failure::new(format!("cannot try the rules with {own}: {error}"));
    let (_reserved, target) = reserve(own, plan).map_err(failed)?;
    // Before the proxy runs, its port is free, and we are the one whom the rules lead to.
    let stand_in = TcpListener::bind((loopback, plan.outbound_port));
    match (TcpStream::connect_timeout(&target, PATIENCE), stand_in) {
        (Ok(caught), Ok(stand_in)) => {
            let accepted = accept(&stand_in).map_err(failed)?;
            drop(caught);
            match original_destination(&accepted).map_err(failed)? {
                Some(original) if original == target => Ok(format!("caught, on its way to {target}")),
                Some(original) => Err(Failure::new(format!(
                    "a connection to {target} was caught, and the kernel says that it was going to {original}"
                ))),
                None => Err(Failure::new(format!(
                    "a connection to {target} was caught, and the kernel does not know where it was going: connection \
                     tracking (nf_conntrack) is missing or switched off"
                ))),
            }
        }
        (Ok(_), Err(_)) => Ok(format!("caught, by the proxy on port {}", plan.outbound_port)),
        (Err(error), Ok(_)) => Err(Failure::new(format!(
            "a connection to {target} was not caught ({error}): other rules of this namespace take it before ours"
        ))),
        (Err(error), Err(bind)) => Err(Failure::new(format!(
            "a connection to {target} got no answer ({error}): either it was not caught, or what holds port {} \
             ({bind}) does not listen on {loopback}",
            plan.outbound_port
        ))),
    }
}

/// A port of `own` which nobody else can listen on while the descriptor is held, and which no exclusion lets pass.
fn reserve(own: IpAddr, plan: &Plan) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if own.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    loop {
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &SocketAddr::new(own, 0))?;
        let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
        // Ephemeral ports come in no order that repeats, and exclusions are few.
        if !plan.exclude_outbound_ports.contains(&bound.port()) {
            return Ok((socket, bound));
        }
    }
}

fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            accepted => return accepted.map(|(stream, _)| stream),
        }
    }
}

/// An address of this host that others can reach, if it has one.
fn own_address(v4: bool) -> Option<IpAddr> {
    let addresses = if_addrs::get_if_addrs().ok()?.into_iter().map(|interface| interface.ip());
    let mut reachable = addresses.filter(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        // A link-local address means nothing without its interface.
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    });
    reachable.find(|ip| ip.is_ipv4() == v4)
}
