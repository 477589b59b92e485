//! Running `nft` and `iptables`, and turning what they say into words of our own.

use std::fmt;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::rules::{Chain, Family, Plan, TABLE};
use crate::Failure;

/// Which program makes the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Nft,
    Iptables,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "nftables",
            Self::Iptables => "iptables",
        })
    }
}

impl Family {
    fn iptables(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    /// Those that this network namespace speaks. Where IPv6 is compiled out or switched off at boot, nothing can go past
    /// the proxy by it, and `ip6tables` would fail.
    fn spoken_here() -> impl Iterator<Item = Self> {
        let v6 = std::fs::exists("/proc/net/if_inet6").unwrap_or(false);
        [Self::V4].into_iter().chain(v6.then_some(Self::V6))
    }
}

/// How a tool ended.
enum Ran {
    Done(String),
    Failed(String),
    Missing,
}

impl Tool {
    /// The better of those that are installed.
    pub(crate) fn preferred() -> Option<Self> {
        [Self::Nft, Self::Iptables].into_iter().find(|tool| tool.is_there())
    }

    /// Whether its program is installed.
    pub(crate) fn is_there(self) -> bool {
        !matches!(self.run_version(), Ran::Missing)
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Nft => Self::Iptables,
            Self::Iptables => Self::Nft,
        }
    }

    fn run_version(self) -> Ran {
        match self {
            Self::Nft => run("nft", &["--version"], ""),
            Self::Iptables => run("iptables", &["--version"], ""),
        }
    }

    /// Puts the rules of `plan` in place of those that are there. Nothing has changed when it fails.
    pub(crate) fn install(self, plan: &Plan) -> Result<(), Failure> {
        match self {
            Self::Nft => done("nft", run("nft", &["-f", "-"], &plan.nft_script())).map(drop),
            Self::Iptables => {
                for family in Family::spoken_here() {
                    if let Err(failure) = install_iptables(plan, family) {
                        // Half of the families caught would look like success to whoever tries one of them.
                        let _ = self.remove_if_there();
                        return Err(failure);
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes away what this tool has made, if the tool is here, and says whether there was anything.
    pub(crate) fn remove_if_there(self) -> Result<bool, Failure> {
        match self {
            Self::Nft => match run("nft", &["list", "tables"], "") {
                Ran::Missing => Ok(false),
                listed => {
                    let there = done("nft", listed)?.lines().any(|line| line.trim() == format!("table {TABLE}"));
                    if there {
                        done("nft", run("nft", &["delete", "table", "inet", "sheetbend"], ""))?;
                    }
                    Ok(there)
                }
            },
            Self::Iptables => {
                let mut there = false;
                for family in Family::spoken_here() {
                    there |= remove_iptables(family)?;
                }
                Ok(there)
            }
        }
    }

    /// How what is in place differs from `plan`, a line each; `None` when this tool has made nothing here.
    pub(crate) fn differences(self, plan: &Plan) -> Result<Option<Vec<String>>, Failure> {
        match self {
            Self::Nft => match run("nft", &["list", "table", "inet", "sheetbend"], "") {
                Ran::Missing => Ok(None),
                Ran::Failed(said) if said.contains("No such file") => Ok(None),
                listed => {
                    let listed = done("nft", listed)?;
                    let found = listed.lines().filter_map(|line| line.split("comment \"").nth(1)?.split('"').next());
                    Ok(Some(compare("nftables", &plan.nft_comments(), &found.map(String::from).collect::<Vec<_>>())))
                }
            },
            Self::Iptables if !self.is_there() => Ok(None),
            Self::Iptables => {
                let mut differences = Vec::new();
                let mut there = false;
                for family in Family::spoken_here() {
                    let rules = list_iptables(family)?;
                    for chain in Chain::BOTH {
                        let mut expected = plan.iptables_rules(chain, family);
                        expected.push(format!("-A {}", chain.iptables_jump()));
                        let found: Vec<_> =
                            rules.iter().filter(|rule| rule.starts_with("-A") && names(rule, chain)).cloned().collect();
                        there |= !found.is_empty();
                        // Jumps are listed before the chains of users.
                        expected.rotate_right(1);
                        differences.extend(compare(family.iptables(), &expected, &found));
                    }
                }
                Ok(there.then_some(differences))
            }
        }
    }
}

fn install_iptables(plan: &Plan, family: Family) -> Result<(), Failure> {
    let there = list_iptables(family)?;
    let led_into = |chain: &Chain| there.contains(&format!("-A {}", chain.iptables_jump()));
    let jumps: Vec<_> = Chain::BOTH.into_iter().filter(|chain| !led_into(chain)).collect();
    restore(family, &plan.iptables_script(family, &jumps))
}

fn remove_iptables(family: Family) -> Result<bool, Failure> {
    if matches!(run(family.iptables(), &["--version"], ""), Ran::Missing) {
        return Ok(false);
    }
    let rules = list_iptables(family)?;
    let ours = |rule: &&String| Chain::BOTH.iter().any(|chain| names(rule, *chain));
    let jumps =
        rules.iter().filter(ours).filter_map(|rule| rule.strip_prefix("-A ").filter(|rest| !rest.starts_with("SHEET")));
    let chains: Vec<_> = rules.iter().filter(ours).filter_map(|rule| rule.strip_prefix("-N ")).collect();
    let mut script = String::from("*nat\n");
    script.extend(jumps.map(|jump| format!("-D {jump}\n")));
    script.extend(chains.iter().map(|chain| format!("-F {chain}\n-X {chain}\n")));
    script.push_str("COMMIT\n");
    if chains.is_empty() {
        return Ok(false);
    }
    restore(family, &script)?;
    Ok(true)
}

/// The nat table as `iptables -S` prints it.
fn list_iptables(family: Family) -> Result<Vec<String>, Failure> {
    let program = family.iptables();
    let listed = done(program, run(program, &["--wait", "5", "-t", "nat", "-S"], ""))?;
    Ok(listed.lines().map(|line| line.trim().to_owned()).collect())
}

fn restore(family: Family, script: &str) -> Result<(), Failure> {
    let program = match family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    };
    done(program, run(program, &["--noflush", "--wait", "5"], script)).map(drop)
}

/// Whether one of the words of a rule is the name of `chain`.
fn names(rule: &str, chain: Chain) -> bool {
    rule.split_whitespace().any(|word| word == chain.iptables_name())
}

fn compare(place: &str, expected: &[String], found: &[String]) -> Vec<String> {
    let missing = expected.iter().filter(|rule| !found.contains(rule)).map(|rule| format!("{place}: missing: {rule}"));
    let strange =
        found.iter().filter(|rule| !expected.contains(rule)).map(|rule| format!("{place}: not expected: {rule}"));
    let mut differences: Vec<_> = missing.chain(strange).collect();
    if differences.is_empty() && expected != found {
        differences.push(format!("{place}: the rules are there, but not once each and in their order"));
    }
    differences
}

fn run(program: &str, args: &[&str], input: &str) -> Ran {
    // Daemons' folders are not on everybody's PATH; words of the tools are looked at, so they are to be English.
    let path = format!("{}:/usr/sbin:/sbin:/usr/local/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.args(args).env("PATH", path).env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ran = command.spawn().and_then(|mut child| {
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input.as_bytes()) {
                // It ended before it had read everything, and will say why.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        child.wait_with_output()
    });
    match ran {
        Ok(out) if out.status.success() => Ran::Done(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Ran::Failed(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ran::Missing,
        Err(error) => Ran::Failed(error.to_string()),
    }
}

/// What a tool printed, or why it failed, with the way to mend it where that is known.
fn done(program: &str, ran: Ran) -> Result<String, Failure> {
    let said = match ran {
        Ran::Done(printed) => return Ok(printed),
        Ran::Missing => {
            return Err(Failure::new(format!("there is no program `{program}` here; install it with its package")));
        }
        Ran::Failed(said) => said,
    };
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let hint = if says(&["Operation not permitted", "Permission denied", "you must be root"]) {
        NO_NET_ADMIN
    } else if says(&[
        "Could not process rule: No such file",
        "not supported",
        "does not exist",
        "No chain/target/match",
    ]) {
        "the kernel has no NAT for it: the modules nft_chain_nat and nft_redir (nftables), or iptable_nat and \
         xt_REDIRECT (iptables), must be there or be loaded on the node"
    } else if says(&["xtables lock"]) {
        "another program holds the lock of iptables; try again"
    } else {
        "nothing was changed"
    };
    Err(Failure::new(format!("{program} failed: {hint}\n{said}")))
}

const NO_NET_ADMIN: &str = "this needs the capability NET_ADMIN in this network namespace: run it as root, or in an init \
                            container with securityContext.capabilities.add: [NET_ADMIN]";

/// Fails when this process may not change rules.
pub(crate) fn need_net_admin() -> Result<(), Failure> {
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    match effective {
        Some(capabilities) if capabilities >> CAP_NET_ADMIN & 1 == 0 => Err(Failure::new(NO_NET_ADMIN)),
        _ => Ok(()), // If /proc is not there, the tool will say it.
    }
}

pub(crate) fn no_tool() -> Failure {
    Failure::new("neither `nft` nor `iptables` is here: install the package nftables (or iptables) in this image")
}
