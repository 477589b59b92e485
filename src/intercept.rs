//! `sheetbend intercept`: redirect a pod's traffic to its sidecar, in the network namespace the command runs in.

use std::io::{self, Write};
use std::process::ExitCode;

use ipnet::IpNet;

use crate::Failure;

mod check;
mod rules;
mod tools;

use rules::Plan;
use tools::Tool;

#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// Print the rules, and change nothing
    Print(Args),
    /// Put the rules in place; those of an earlier install are replaced in one step
    Install(Args),
    /// Say whether the rules are in place, and whether they catch a connection
    Check(Args),
    /// Take the rules away, whichever tool made them
    Remove,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which tool makes the rules
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// The user whose own traffic is let through: the proxy's
    #[arg(long, value_name = "UID", default_value_t = 1515)]
    proxy_uid: u32,
    /// Where the proxy takes what the app sends
    #[arg(long, value_name = "PORT", default_value_t = 15101, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,
    /// Where the proxy takes what is sent to the app
    #[arg(long, value_name = "PORT", default_value_t = 15106, value_parser = clap::value_parser!(u16).range(1..))]
    inbound_port: u16,
    /// Ports of the app that are reached past the proxy
    #[arg(long, value_name = "PORT,…", value_delimiter = ',')]
    exclude_inbound_ports: Vec<u16>,
    /// Ports anywhere that the app reaches past the proxy
    #[arg(long, value_name = "PORT,…", value_delimiter = ',')]
    exclude_outbound_ports: Vec<u16>,
    /// Addresses that the app reaches past the proxy, such as 203.0.113.0/24 or 2001:db8::/32
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    exclude_outbound_cidrs: Vec<IpNet>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// nftables where `nft` is there, else iptables
    Auto,
    Nft,
    Iptables,
}

pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Print(args) => print(&args),
        Verb::Install(args) => install(&args),
        Verb::Check(args) => check::check(args.tool_asked_for(), &args.plan()?),
        Verb::Remove => remove(),
    }
}

fn print(args: &Args) -> Result<ExitCode, Failure> {
    let tool = args.tool_asked_for().or_else(Tool::preferred).unwrap_or(Tool::Nft);
    let text = match tool {
        Tool::Nft => args.plan()?.nft_script(),
        Tool::Iptables => args.plan()?.iptables_listing(),
    };
    // A reader who has seen enough (`| head`) is no failure.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(error)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn install(args: &Args) -> Result<ExitCode, Failure> {
    let plan = args.plan()?;
    tools::need_net_admin()?;
    let Some(first) = args.tool_asked_for().or_else(Tool::preferred) else { return Err(tools::no_tool()) };
    let tool = match first.install(&plan) {
        Ok(()) => first,
        Err(failure) if args.tool_asked_for().is_some() || !first.other().is_there() => return Err(failure),
        // An image may hold `nft` where the kernel knows iptables alone.
        Err(failure) => match first.other().install(&plan) {
            Ok(()) => first.other(),
            Err(_) => return Err(failure),
        },
    };
    // Rules of the other tool, from an earlier install, would be asked as well. One that fails has made none.
    let _ = tool.other().remove_if_there();
    eprintln!(
        "traffic is caught with {tool}: the app's goes to port {}, what is sent to it to port {}; user {} is let through",
        plan.outbound_port, plan.inbound_port, plan.proxy_uid
    );
    Ok(ExitCode::SUCCESS)
}

fn remove() -> Result<ExitCode, Failure> {
    tools::need_net_admin()?;
    if Tool::preferred().is_none() {
        return Err(tools::no_tool());
    }
    let removed = match (Tool::Nft.remove_if_there(), Tool::Iptables.remove_if_there()) {
        (Err(failure), Err(_)) => return Err(failure),
        // A tool that does not work in this kernel has made nothing here.
        (nft, iptables) => nft.unwrap_or(false) || iptables.unwrap_or(false),
    };
    eprintln!("{}", if removed { "traffic is no longer caught" } else { "there were no rules of Sheetbend here" });
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn tool_asked_for(&self) -> Option<Tool> {
        match self.backend {
            Backend::Auto => None,
            Backend::Nft => Some(Tool::Nft),
            Backend::Iptables => Some(Tool::Iptables),
        }
    }

    /// Every wrong value is told at once.
    fn plan(&self) -> Result<Plan, Failure> {
        let mut wrong = Vec::new();
        if self.outbound_port == self.inbound_port {
            wrong.push(format!("--outbound-port and --inbound-port are both {}; they must differ", self.inbound_port));
        }
        if self.proxy_uid == 0 {
            wrong.push(
                "--proxy-uid 0: everything that runs as root would go past the proxy; give it a user of its own".into(),
            );
        }
        for (flag, ports) in [
            ("--exclude-inbound-ports", &self.exclude_inbound_ports),
            ("--exclude-outbound-ports", &self.exclude_outbound_ports),
        ] {
            if ports.contains(&0) {
                wrong.push(format!("{flag}: 0 is no port; take 1 to 65535"));
            }
        }
        for range in &self.exclude_outbound_cidrs {
            if range.prefix_len() == 0 {
                wrong.push(format!(
                    "--exclude-outbound-cidrs {range}: that is every address, so nothing would be caught"
                ));
            }
        }
        if !wrong.is_empty() {
            return Err(Failure::usage(wrong.join("\n       ")));
        }
        Ok(Plan {
            proxy_uid: self.proxy_uid,
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            exclude_inbound_ports: distinct(&self.exclude_inbound_ports),
            exclude_outbound_ports: distinct(&self.exclude_outbound_ports),
            exclude_outbound_ranges: IpNet::aggregate(&self.exclude_outbound_cidrs.iter().map(IpNet::trunc).collect()),
        })
    }
}

fn distinct(ports: &[u16]) -> Vec<u16> {
    let mut ports = ports.to_vec();
    ports.sort_unstable();
    ports.dedup();
    ports
}
