//! PURE: a path as the servers behind this proxy may read it.
//!
//! The app gets a path as it was sent, and nobody knows which server reads it how. So a path is held against policies in
//! every reading that a server may have: as it was sent, in normal form (RFC 3986 §6.2.2, each escape undone that need
//! not be one, slashes merged), and so without its `;parameters`. Who is to be let in must match in all of them, who is to
//! be kept out in any. What could be read in still other ways (dot segments, escaped slashes, an escape of an escape) is
//! refused: no client sends that by mistake.

use std::borrow::Cow;

use sheetbend_control_plane_client::model::access::is_plain;

/// A path that is read in one way or in a few.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path<'a> {
    /// These.
    Read {
        /// As it was sent.
        sent: &'a str,
        /// In normal form, where that differs.
        normal: Option<String>,
        /// In normal form without parameters, where it has some.
        bare: Option<String>,
    },
    /// Nobody knows how it will be read, and why.
    Ambiguous(&'static str),
}

impl Path<'_> {
    /// Whether `holds` is true however the path is read.
    pub fn in_all(&self, holds: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Read { sent, normal, bare } => {
                holds(sent) && normal.as_deref().is_none_or(&holds) && bare.as_deref().is_none_or(&holds)
            }
            Self::Ambiguous(_) => false,
        }
    }

    /// Whether `holds` is true in any way in which the path may be read. Many servers answer `/a/` as they do `/a`.
    pub fn in_any(&self, holds: impl Fn(&str) -> bool) -> bool {
        let Self::Read { sent, normal, bare } = self else { return true };
        let last = bare.as_deref().or(normal.as_deref()).unwrap_or(sent);
        let untrailed = Some(last.trim_end_matches('/')).filter(|path| !path.is_empty());
        holds(sent)
            || normal.as_deref().is_some_and(&holds)
            || bare.as_deref().is_some_and(&holds)
            || untrailed.is_some_and(&holds)
    }
}

/// Reads a path without its query. Allocates only for one that is not in normal form.
pub fn read(path: &str) -> Path<'_> {
    if path == "*" {
        return Path::Read { sent: path, normal: None, bare: None };
    }
    match normalize(path) {
        Err(why) => Path::Ambiguous(why),
        Ok(Cow::Borrowed(_)) if !path.contains(';') => Path::Read { sent: path, normal: None, bare: None },
        Ok(normal) => {
            let bare = normal.contains(';').then(|| merge(&without_parameters(&normal)).into_owned());
            let normal = (normal != path).then(|| normal.into_owned());
            Path::Read { sent: path, normal, bare }
        }
    }
}

fn normalize(path: &str) -> Result<Cow<'_, str>, &'static str> {
    if !path.starts_with('/') {
        return Err("no slash at its beginning");
    }
    if path.bytes().any(|byte| byte == b'\\') {
        return Err("a backslash");
    }
    if path.bytes().any(|byte| byte <= b' ' || byte >= 0x7f) {
        return Err("a character that must be escaped");
    }
    let unescaped = match path.bytes().all(|byte| is_plain(byte) || byte == b'/') {
        true => Cow::Borrowed(path),
        false => Cow::Owned(unescape(path)?),
    };
    let dots = |part: &str| matches!(part.split(';').next(), Some("." | ".."));
    if unescaped.split('/').any(dots) {
        return Err("a `.` or `..` in it");
    }
    Ok(match unescaped {
        Cow::Borrowed(path) => merge(path),
        Cow::Owned(path) => Cow::Owned(merge(&path).into_owned()),
    })
}

/// Undoes the escapes that need not be one, and writes all others in one way.
fn unescape(path: &str) -> Result<String, &'static str> {
    let mut out = String::with_capacity(path.len() + 8);
    // What non-ASCII escapes stand for, `/` between two runs of them.
    let mut beyond = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            match is_plain(byte) || byte == b'/' {
                true => out.push(char::from(byte)),
                false => escape(&mut out, byte),
            }
            beyond.push(b'/');
            continue;
        }
        let (value, after) = triplet(rest).ok_or("a broken escape")?;
        rest = after;
        match value {
            b'/' => return Err("an escaped slash"),
            b'\\' => return Err("an escaped backslash"),
            b';' => return Err("an escaped semicolon"),
            0..=0x1f | 0x7f => return Err("an escaped control character"),
            value if is_plain(value) => out.push(char::from(value)),
            value => escape(&mut out, value),
        }
        beyond.push(if value.is_ascii() { b'/' } else { value });
    }
    // Looked for in the end: the digits behind it may have been escaped themselves.
    if out.match_indices("%25").any(|(at, sign)| triplet(&out.as_bytes()[at + sign.len()..]).is_some()) {
        return Err("an escape of an escape");
    }
    // `%C0%AF` is a slash to those who do not look closely.
    match std::str::from_utf8(&beyond) {
        Ok(_) => Ok(out),
        Err(_) => Err("an escape that is no UTF-8"),
    }
}

fn triplet(text: &[u8]) -> Option<(u8, &[u8])> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let (high, rest) = text.split_first()?;
    let (low, rest) = rest.split_first()?;
    Some(((digit(high)? * 16 + digit(low)?) as u8, rest))
}

fn escape(out: &mut String, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |half: u8| char::from(HEX[usize::from(half & 0xf)]);
    out.extend(['%', digit(byte >> 4), digit(byte)]);
}

/// One slash for many.
fn merge(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// `/a;x=1/b` is `/a/b` to many servers.
fn without_parameters(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').map(|part| part.split(';').next().unwrap_or_default()).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a policy that lets `/public/*` in, and one that keeps `/admin*` out, say of a path.
    fn verdicts(path: &str) -> (bool, bool) {
        let read = read(path);
        let admitted = read.in_all(|path| path.starts_with("/public/"));
        let kept_out = read.in_any(|path| path == "/admin" || path.starts_with("/admin/"));
        (admitted, kept_out)
    }

    #[test]
    fn no_way_of_writing_a_path_opens_a_door() {
        for attack in [
            "/admin",
            "/admin/",
            "//admin",
            "/admin//",
            "///admin///x",
            "/%61dmin",
            "/%61%64%6d%69%6e",
            "/ADMIN/../admin",
            "/public/../admin",
            "/public/%2e%2e/admin",
            "/public/%2E./admin",
            "/public/.%2e/admin",
            "/./admin",
            "/public/..;/admin",
            "/public/..;x=1/admin",
            "/public/%2e%2e;/admin",
            "/admin;x=1",
            "/admin;/x",
            "/;x/admin",
            "/admin;x/y",
            "/public/..%2fadmin",
            "/public%2f..%2fadmin",
            "/%2fadmin",
            "/admin%2f",
            "/admin%2Fx",
            "/admin%5cx",
            "/public/..%5cadmin",
            "/public\\..\\admin",
            "\\admin",
            "/admin\\x",
            "/%5cadmin",
            "/admin%00",
            "/admin%00.png",
            "/public/%252e%252e/admin",
            "/%2561dmin",
            "/admin%252f",
            "/%25%36%31dmin",
            "/admin%3bx",
            "/public/..%3b/admin",
            "/%c0%afadmin",
            "/public/%c0%ae%c0%ae/admin",
            "/%e0%80%afadmin",
            "/admin%",
            "/admin%2",
            "/%u0061dmin",
            "/admin%0a",
            "/admin%09",
            "/admin%7f",
            "admin",
            "",
            "http://x/admin",
            "/admin/.",
            "/admin/..;/..;/admin",
            "/public/./../admin",
            "/public/..",
            "/é",
            "/admin x",
            "/public/..;",
            "/%61dmin/",
            "/%61dmin;x//y",
        ] {
            let (admitted, kept_out) = verdicts(attack);
            assert!(
                !admitted && kept_out,
                "{attack}: admitted {admitted}, kept out {kept_out}, read as {:?}",
                read(attack)
            );
        }
        for other in ["/public/a", "/public//a", "/public/%61", "/public/a;x=1", "/public/caf%c3%a9", "/public/a%20b"] {
            assert_eq!(verdicts(other), (true, false), "{other}");
        }
        for neither in ["/", "/administrator", "/public", "/public;x/../a", "/%70ublic/a", "/publi%63/a", "//public/a"]
        {
            assert!(!verdicts(neither).0, "{neither}");
        }
    }

    #[test]
    fn a_path_in_normal_form_is_read_in_one_way() {
        for path in ["/", "/a/b", "/a/", "/.well-known/x", "/v1/users:do", "/a,b=c@d!$&'()*+~_-.", "*"] {
            assert_eq!(read(path), Path::Read { sent: path, normal: None, bare: None });
        }
        let odd = read("/a%20%c3%a9%3a;b//%7ec;d");
        let (normal, bare) = ("/a%20%C3%A9:;b/~c;d".to_string(), "/a%20%C3%A9:/~c".to_string());
        assert_eq!(odd, Path::Read { sent: "/a%20%c3%a9%3a;b//%7ec;d", normal: Some(normal), bare: Some(bare) });
    }

    /// What a careless server makes of a path: it undoes escapes as often as it likes, drops parameters, turns
    /// backslashes, merges slashes and follows dots.
    fn careless(path: &str, rounds: usize, parameters: bool, backslashes: bool, merges: bool) -> String {
        let mut path = path.to_string();
        if parameters {
            path = without_parameters(&path);
        }
        for _ in 0..rounds {
            let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
            while let Some((&byte, after)) = rest.split_first() {
                rest = after;
                match triplet(rest) {
                    Some((value, after)) if byte == b'%' => {
                        bytes.push(value);
                        rest = after;
                    }
                    _ => bytes.push(byte),
                }
            }
            path = String::from_utf8_lossy(&bytes).into_owned();
        }
        if backslashes {
            path = path.replace('\\', "/");
        }
        let mut parts: Vec<&str> = Vec::new();
        for part in path.split('/').skip(1) {
            match part {
                "." => {}
                ".." => drop(parts.pop()),
                "" if merges => {}
                part => parts.push(part),
            }
        }
        format!("/{}", parts.join("/"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn no_careless_server_is_reached_where_a_policy_keeps_out(
            parts in prop::collection::vec(prop::sample::select(vec![
                "/", "//", "admin", "public", ".", "..", "%2e", "%2E", "%2f", "%5c", "\\", ";", ";x=1", "%3b", "%00",
                "%61dmin", "%2561dmin", "%25", "adm", "in", "%69n", "*", "%c3%a9",
            ]), 1..8),
            rounds in 0usize..3, parameters: bool, backslashes: bool, merges: bool,
        ) {
            let path = format!("/{}", parts.concat());
            let reached = careless(&path, rounds, parameters, backslashes, merges);
            let (admitted, kept_out) = verdicts(&path);
            let is_admin = reached == "/admin" || reached.starts_with("/admin/");
            prop_assert!(!is_admin || kept_out, "{path} reaches {reached}");
            let inside = reached.starts_with("/public/") || reached == "/public";
            prop_assert!(!admitted || inside, "{path} reaches {reached}");
        }

        #[test]
        fn a_normal_form_is_its_own(path in "/[a-c%/;.0-9]{0,12}") {
            if let Path::Read { normal: Some(normal), .. } = read(&path) {
                let again = read(&normal);
                prop_assert!(matches!(again, Path::Read { normal: None, .. }), "{path}: {normal}: {again:?}");
            }
        }

        #[test]
        fn whatever_comes_is_read(path in "\\PC{0,40}") {
            let _ = read(&path);
        }
    }
}
