//! The rules, and how nftables and iptables spell them. Pure: nothing here touches the kernel.
//!
//! Two lists, each read until a rule decides. What the app sends (nat OUTPUT): the proxy's own user passes, loopback
//! passes, so do the exclusions, all other TCP goes to the outbound port. What is sent to the app (nat PREROUTING): the
//! proxy's own ports pass, so do the exclusions, all other TCP goes to the inbound port.
//!
//! A pod that calls itself through its service needs nothing more: the call is caught like any other, the proxy hands it to
//! its own inbound side in process, and what that dials belongs to the proxy's user. The outbound port is not among those that
//! pass PREROUTING: whoever connects to it from outside reaches the inbound side, which refuses the proxy's own ports.

use std::fmt::Write;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Ports of the proxy that are reached from outside as they are: admin (which listens on loopback, and so refuses) and
/// metrics with readiness.
const OWN_PORTS: [u16; 2] = [15100, 15120];

/// The nftables table that holds all rules.
pub(crate) const TABLE: &str = "inet sheetbend";

/// What is to be caught, and what is not.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) proxy_uid: u32,
    pub(crate) outbound_port: u16,
    pub(crate) inbound_port: u16,
    pub(crate) exclude_inbound_ports: Vec<u16>,
    pub(crate) exclude_outbound_ports: Vec<u16>,
    pub(crate) exclude_outbound_ranges: Vec<IpNet>,
}

/// One of the two lists.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Chain {
    Outbound,
    Inbound,
}

/// One rule: whom it meets, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    PassProxy(u32),
    PassLoopback(IpNet),
    PassRange(IpNet),
    PassOwnPort(u16),
    PassPort(u16),
    Catch(u16),
}

/// The two protocols that iptables treats apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Chain {
    pub(crate) const BOTH: [Self; 2] = [Self::Outbound, Self::Inbound];

    /// Its name in iptables.
    pub(crate) fn iptables_name(self) -> &'static str {
        match self {
            Self::Outbound => "SHEETBEND_OUTBOUND",
            Self::Inbound => "SHEETBEND_INBOUND",
        }
    }

    /// The rule that leads into it, as `iptables -S` prints it after `-A`.
    pub(crate) fn iptables_jump(self) -> String {
        let hook = match self {
            Self::Outbound => "OUTPUT",
            Self::Inbound => "PREROUTING",
        };
        format!("{hook} -p tcp -j {}", self.iptables_name())
    }
}

impl Plan {
    fn rules(&self, chain: Chain) -> Vec<Rule> {
        match chain {
            Chain::Outbound => {
                let loopback = [
                    IpNet::V4(Ipv4Net::new_assert([127, 0, 0, 0].into(), 8)),
                    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
                ];
                let mut rules = vec![Rule::PassProxy(self.proxy_uid)];
                rules.extend(loopback.map(Rule::PassLoopback));
                rules.extend(self.exclude_outbound_ranges.iter().copied().map(Rule::PassRange));
                rules.extend(self.exclude_outbound_ports.iter().copied().map(Rule::PassPort));
                rules.push(Rule::Catch(self.outbound_port));
                rules
            }
            Chain::Inbound => {
                let mut rules: Vec<_> = OWN_PORTS.map(Rule::PassOwnPort).into();
                rules.extend(self.exclude_inbound_ports.iter().copied().map(Rule::PassPort));
                rules.push(Rule::Catch(self.inbound_port));
                rules
            }
        }
    }

    /// A script for `nft -f`: one transaction, which replaces whatever an earlier one has left.
    pub(crate) fn nft_script(&self) -> String {
        let mut script = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
        for (chain, hook) in [(Chain::Outbound, "output"), (Chain::Inbound, "prerouting")] {
            let name = hook_name(chain);
            // -100 is where destination NAT has its place (`dstnat`, a word that hook output lacks).
            let _ = writeln!(script, "\tchain {name} {{\n\t\ttype nat hook {hook} priority -100; policy accept;");
            for rule in self.rules(chain) {
                let _ = writeln!(script, "\t\t{} comment \"{}\"", rule.nft(), rule.why());
            }
            script.push_str("\t}\n");
        }
        script.push_str("}\n");
        script
    }

    /// The comments of the rules in the order in which `nft list table` shows them. Compared instead of the rules, whose
    /// spelling differs between versions of `nft`.
    pub(crate) fn nft_comments(&self) -> Vec<String> {
        Chain::BOTH.iter().flat_map(|chain| self.rules(*chain)).map(|rule| rule.why()).collect()
    }

    /// The rules of one chain, just as `iptables -S` prints them.
    pub(crate) fn iptables_rules(&self, chain: Chain, family: Family) -> Vec<String> {
        let rules = self.rules(chain).into_iter().filter_map(|rule| rule.iptables(family));
        rules.map(|rule| format!("-A {} {rule}", chain.iptables_name())).collect()
    }

    /// A script for `iptables-restore --noflush`: one transaction. A chain that is declared is emptied first; `jumps` are the
    /// chains that nothing leads into yet.
    pub(crate) fn iptables_script(&self, family: Family, jumps: &[Chain]) -> String {
        let mut script = String::from("*nat\n");
        for chain in Chain::BOTH {
            let _ = writeln!(script, ":{} - [0:0]", chain.iptables_name());
        }
        for rule in Chain::BOTH.iter().flat_map(|chain| self.iptables_rules(*chain, family)) {
            let _ = writeln!(script, "{rule}");
        }
        for chain in jumps {
            let _ = writeln!(script, "-A {}", chain.iptables_jump());
        }
        script.push_str("COMMIT\n");
        script
    }

    /// Both scripts, for a reader.
    pub(crate) fn iptables_listing(&self) -> String {
        format!(
            "# iptables-restore --noflush\n{}\n# ip6tables-restore --noflush\n{}",
            self.iptables_script(Family::V4, &Chain::BOTH),
            self.iptables_script(Family::V6, &Chain::BOTH)
        )
    }
}

/// The name of a chain in nftables.
fn hook_name(chain: Chain) -> &'static str {
    match chain {
        Chain::Outbound => "outbound",
        Chain::Inbound => "inbound",
    }
}

impl Rule {
    fn why(self) -> String {
        match self {
            Self::PassProxy(uid) => format!("the proxy itself, user {uid}"),
            Self::PassLoopback(range) => format!("loopback {range}"),
            Self::PassRange(range) => format!("excluded range {range}"),
            Self::PassOwnPort(port) => format!("own port {port}"),
            Self::PassPort(port) => format!("excluded port {port}"),
            Self::Catch(port) => format!("all other TCP to {port}"),
        }
    }

    fn nft(self) -> String {
        match self {
            Self::PassProxy(uid) => format!("meta skuid {uid} return"),
            Self::PassLoopback(IpNet::V4(range)) | Self::PassRange(IpNet::V4(range)) => {
                format!("ip daddr {range} return")
            }
            Self::PassLoopback(IpNet::V6(range)) | Self::PassRange(IpNet::V6(range)) => {
                format!("ip6 daddr {range} return")
            }
            Self::PassOwnPort(port) | Self::PassPort(port) => format!("tcp dport {port} return"),
            Self::Catch(port) => format!("meta l4proto tcp redirect to :{port}"),
        }
    }

    /// `None` when the rule is about the other family.
    fn iptables(self, family: Family) -> Option<String> {
        match self {
            Self::PassProxy(uid) => Some(format!("-m owner --uid-owner {uid} -j RETURN")),
            Self::PassLoopback(range) | Self::PassRange(range) => {
                let range_family = if matches!(range, IpNet::V4(_)) { Family::V4 } else { Family::V6 };
                (range_family == family).then(|| format!("-d {range} -j RETURN"))
            }
            Self::PassOwnPort(port) | Self::PassPort(port) => Some(format!("-p tcp -m tcp --dport {port} -j RETURN")),
            Self::Catch(port) => Some(format!("-p tcp -j REDIRECT --to-ports {port}")),
        }
    }
}
