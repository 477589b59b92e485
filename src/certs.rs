//! `sheetbend certs`: make and look at certificates.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use sheetbend_certs::files::{self, Access};
use sheetbend_certs::{
    Ca, Csr, IssueRequest, KeyAndCsr, SpiffeId, TrustBundle, TrustDomain, decode_certificates, describe_root,
    format_span, format_time,
};

use crate::Failure;

mod drop_old;
mod show;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Make a CA: a root and an issuing CA
    Init {
        /// Where to make it; a directory that has a CA is left as it is
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// The realm that it signs for
        #[arg(long, value_name = "NAME", default_value = "cluster.local")]
        trust_domain: TrustDomain,
    },
    /// Sign a certificate: cert.pem (leaf, then issuer), key.pem, bundle.pem
    Issue(Issue),
    /// Show what certificates say
    Inspect {
        /// A PEM file: a chain, or a bundle
        file: PathBuf,
        /// Table or JSON
        #[arg(short, long, value_enum, default_value = "table")]
        output: show::Output,
    },
    /// Check a workload's chain against a trust bundle, as a proxy would
    Verify {
        /// A PEM file: leaf first
        cert: PathBuf,
        /// A PEM file: the roots to believe
        #[arg(long, value_name = "FILE")]
        bundle: PathBuf,
    },
    /// Put a new root beside the old one; with --drop-old, stop believing the old one
    Rotate {
        /// The CA's directory
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Stop believing the old root: refused while a proxy still needs it
        #[arg(long)]
        drop_old: bool,
        /// With --drop-old: no control plane runs, and nobody can be asked
        #[arg(long, requires = "drop_old")]
        offline: bool,
        /// With --drop-old: do not wait for proxies that have been silent for this long (10m, 24h); one that comes back
        /// needs a new join token
        #[arg(long, value_name = "TIME", value_parser = parse_ttl, requires = "drop_old")]
        leave_behind: Option<Duration>,
    },
}

#[derive(Args)]
pub(crate) struct Issue {
    /// The CA's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The workload's name
    #[arg(long, value_name = "NAME", required_unless_present = "spiffe_id")]
    service: Option<String>,
    /// The workload's namespace
    #[arg(long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// The whole name, instead of --service and --namespace
    #[arg(long, value_name = "ID", conflicts_with_all = ["service", "namespace"])]
    spiffe_id: Option<SpiffeId>,
    /// Where to write the files [default: a directory named like the service]
    #[arg(long, value_name = "DIR", required_unless_present = "service")]
    out: Option<PathBuf>,
    /// Sign the key of this request (PEM or DER; - is standard input), and make none. The names in it are ignored
    #[arg(long, value_name = "FILE")]
    csr: Option<PathBuf>,
    /// How long it lives: 90s, 10m, 24h, 1h30m, 7d
    #[arg(long, value_name = "TIME", value_parser = parse_ttl, default_value = "24h")]
    ttl: Duration,
    /// A DNS name or address besides (for a control plane); may be given more than once
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    dns: Vec<String>,
}

pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    print!("{}", carry_out(verb, SystemTime::now())?);
    Ok(ExitCode::SUCCESS)
}

/// Does it, and gives what is to be printed.
fn carry_out(verb: Verb, now: SystemTime) -> Result<String, Failure> {
    match verb {
        Verb::Init { dir, trust_domain } => init(&dir, &trust_domain, now),
        Verb::Issue(args) => issue(&args, now),
        Verb::Inspect { file, output } => show::inspect(&file, output, now),
        Verb::Verify { cert, bundle } => verify(&cert, &bundle, now),
        Verb::Rotate { dir, drop_old: false, .. } => rotate(&dir, now),
        Verb::Rotate { dir, drop_old: true, offline, leave_behind } => {
            drop_old::drop_old(&dir, offline, leave_behind, now)
        }
    }
}

fn init(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<String, Failure> {
    let ca = Ca::init(dir, trust_domain, now).map_err(Failure::new)?;
    let root = ca.active_root().map_err(Failure::new)?;
    let (dir, id) = (dir.display(), root.sha256());
    Ok(format!(
        "made a CA for {trust_domain} in {dir}\n\
         root      {}\n\
         sha256    {id}\n\
         bundle    {dir}/bundle.pem\n\
         Keep {dir} private: whoever reads its .key files can be anybody in this mesh.\n",
        describe_root(&root, now),
    ))
}

fn issue(args: &Issue, now: SystemTime) -> Result<String, Failure> {
    let ca = Ca::open(&args.dir, now).map_err(Failure::new)?;
    let id = match (&args.spiffe_id, &args.service) {
        (Some(id), _) => id.clone(),
        (None, Some(service)) => {
            let trust_domain = ca.trust_domain().map_err(Failure::new)?;
            SpiffeId::for_workload(&trust_domain, &args.namespace, service).map_err(Failure::usage)?
        }
        (None, None) => return Err(Failure::usage("whose certificate? give --service or --spiffe-id")),
    };
    // The parser has made sure that there is one of the two.
    let out = args.out.clone().or(args.service.clone().map(PathBuf::from)).unwrap_or_default();
    let (cert, key, bundle) = (out.join("cert.pem"), out.join("key.pem"), out.join("bundle.pem"));
    let fresh = if args.csr.is_none() { Some(KeyAndCsr::generate().map_err(Failure::new)?) } else { None };
    if out.exists() && !out.is_dir() {
        return Err(Failure::new(format!("{} is no directory; give another --out", out.display())));
    }
    // Before anything is signed: an old key must not meet a new certificate, nor the other way round.
    for path in [Some(&cert), fresh.is_some().then_some(&key)].into_iter().flatten() {
        if path.exists() {
            return Err(Failure::new(format!(
                "{0} is there already, and stays; give another --out, or remove {0} first",
                path.display()
            )));
        }
    }
    let csr = match (&fresh, &args.csr) {
        (None, Some(path)) => Csr::parse(&read(path)?).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?,
        (fresh, _) => Csr::parse(fresh.as_ref().map(KeyAndCsr::csr_der).unwrap_or_default()).map_err(Failure::new)?,
    };
    let (ips, dns): (Vec<_>, Vec<_>) = args.dns.iter().cloned().partition(|name| name.parse::<IpAddr>().is_ok());
    let ips = ips.iter().filter_map(|ip| ip.parse().ok()).collect();
    let issued = ca.issue(&IssueRequest { id: id.clone(), csr, ttl: args.ttl, dns, ips }, now).map_err(Failure::new)?;

    let failed = |path: &Path, e| Failure::new(format!("cannot write {}: {e}", path.display()));
    std::fs::create_dir_all(&out).map_err(|e| failed(&out, e))?;
    let mut written = format!("issued {id}\n");
    if let Some(fresh) = fresh {
        files::create_new(&key, fresh.key_pem().as_bytes(), Access::Owner).map_err(|e| failed(&key, e))?;
        let _ = writeln!(written, "key       {} (0600)", key.display());
    }
    files::create_new(&cert, issued.chain_pem().as_bytes(), Access::Everybody).map_err(|e| failed(&cert, e))?;
    let roots = ca.bundle().map_err(Failure::new)?.to_pem();
    files::replace(&bundle, roots.as_bytes(), Access::Everybody).map_err(|e| failed(&bundle, e))?;
    let left = format_span(issued.not_after.duration_since(now).unwrap_or_default());
    let _ = writeln!(written, "cert      {} (leaf, then issuer)", cert.display());
    let _ = writeln!(written, "bundle    {}", bundle.display());
    let _ = writeln!(written, "valid     until {} ({left})", format_time(issued.not_after));
    let _ = writeln!(written, "Nobody renews what was issued by hand: issue another before it ends.");
    Ok(written)
}

fn verify(cert: &Path, bundle: &Path, now: SystemTime) -> Result<String, Failure> {
    let chain = decode_certificates(&read_text(cert)?).map_err(|e| Failure::new(format!("{}: {e}", cert.display())))?;
    let roots =
        TrustBundle::from_pem(&read_text(bundle)?).map_err(|e| Failure::new(format!("{}: {e}", bundle.display())))?;
    let peer = roots
        .verify(&chain, now)
        .map_err(|e| Failure::new(format!("{} does not verify against {}: {e}", cert.display(), bundle.display())))?;
    let root = roots.roots().iter().find(|root| root.sha256() == peer.root);
    let left = format_span(peer.not_after.duration_since(now).unwrap_or_default());
    Ok(format!(
        "{}: OK\nname      {}\nvalid     until {} ({left} left)\nroot      {}\n",
        cert.display(),
        peer.id,
        format_time(peer.not_after),
        root.map(|root| describe_root(root, now)).unwrap_or_default(),
    ))
}

fn rotate(dir: &Path, now: SystemTime) -> Result<String, Failure> {
    let ca = Ca::open(dir, now).map_err(Failure::new)?;
    ca.rotate(now).map_err(Failure::new)?;
    let (root, old) = (ca.active_root().map_err(Failure::new)?, ca.retiring_roots().map_err(Failure::new)?);
    let mut said = format!("new root  {}\nsha256    {}\n", describe_root(&root, now), root.sha256());
    for old in &old {
        let _ = writeln!(said, "old root  {}: still believed, signs nothing more", describe_root(old, now));
    }
    let _ = write!(
        said,
        "What is issued from now on verifies with either root. A control plane on this directory hands out both by itself;\n\
         bundle.pem files that were copied by hand need a new copy of {0}/bundle.pem.\n\
         Then: sheetbend certs rotate --dir {0} --drop-old\n",
        dir.display(),
    );
    Ok(said)
}

/// At most 1 MiB of a file, or of standard input.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    use std::io::Read;
    const MAX: u64 = 1024 * 1024;
    let failed = |e: std::io::Error| Failure::new(format!("cannot read {}: {e}", path.display()));
    let mut bytes = Vec::new();
    match path.as_os_str() == "-" {
        true => std::io::stdin().take(MAX).read_to_end(&mut bytes).map_err(failed)?,
        false => std::fs::File::open(path).and_then(|file| file.take(MAX).read_to_end(&mut bytes)).map_err(failed)?,
    };
    Ok(bytes)
}

fn read_text(path: &Path) -> Result<String, Failure> {
    String::from_utf8(read(path)?)
        .map_err(|_| Failure::new(format!("{} is no PEM file: it is not text", path.display())))
}

/// `90s`, `10m`, `24h`, `1h30m`, `7d`.
pub(crate) fn parse_ttl(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is no time span; write one like 90s, 10m, 24h, 1h30m or 7d");
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
        let number: u64 = rest[..digits].parse().map_err(|_| refuse())?;
        let unit = match rest[digits..].chars().next() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86_400,
            _ => return Err(refuse()),
        };
        let part = number.checked_mul(unit).filter(|&seconds| seconds <= 100 * 365 * 86_400).ok_or_else(refuse)?;
        total += Duration::from_secs(part);
        rest = &rest[digits + 1..];
    }
    if total.is_zero() { Err(refuse()) } else { Ok(total) }
}

#[cfg(test)]
mod tests;
