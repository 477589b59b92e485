//! PURE: whether a token is what it says (RFC 7519, with the advice of RFC 8725). Time comes in as an argument.
//!
//! A key verifies with one algorithm, the one that it is for; what a token says of itself only chooses among them. So there
//! is no `none`, and no public key is ever taken for a shared secret.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde::Deserialize;
use serde_json::{Map, Value};
use sheetbend_control_plane_client::model::{Glob, KeyMaterial, PublicKey, TokenIssuer};

/// A longer token is not looked at.
const MAX_TOKEN: usize = 8 * 1024;
/// How far clocks may be apart.
const SKEW: Duration = Duration::from_secs(60);

/// Why a token is not believed; for the log, never for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// More than one Authorization header.
    #[error("there is more than one Authorization header")]
    Several,
    /// Longer than 8 KiB.
    #[error("it is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Not three parts of base64url, JSON in two of them.
    #[error("it is no JWT")]
    Malformed,
    /// Its header wants something understood that is not (RFC 7515 §4.1.11).
    #[error("its header has `crit`")]
    Critical,
    /// Neither RS256 nor ES256 nor EdDSA.
    #[error("its algorithm is none of RS256, ES256 and EdDSA")]
    Algorithm,
    /// Of somebody who is not believed.
    #[error("its issuer is not known")]
    Issuer,
    /// No key of its issuer has this name and algorithm.
    #[error("no key of its issuer has its `kid` and algorithm")]
    Key,
    /// Signed by somebody else, or changed since.
    #[error("its signature is wrong")]
    Signature,
    /// No `exp`, or none that is a number.
    #[error("it has no `exp`")]
    Unending,
    /// Past its `exp`.
    #[error("it has expired")]
    Expired,
    /// Before its `nbf`.
    #[error("it is not valid yet")]
    Early,
    /// For somebody else.
    #[error("it is for another audience")]
    Audience,
}

/// Whose tokens are believed.
#[derive(Debug, Default)]
pub struct Tokens {
    issuers: Vec<TokenIssuer>,
}

/// The header of a token (RFC 7515 §4.1), as far as it is looked at.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl Tokens {
    /// Made ready.
    pub fn new(issuers: &[TokenIssuer]) -> Self {
        Self { issuers: issuers.to_vec() }
    }

    /// Whether nobody's tokens are believed, and none are looked at.
    pub fn is_empty(&self) -> bool {
        self.issuers.is_empty()
    }

    /// What the token of a request says; nothing where it has none, or nobody's are believed. Each request's is verified
    /// anew: 30 to 150 µs.
    ///
    /// # Errors
    ///
    /// There is a token, and it is not to be believed.
    pub fn claims(&self, headers: &HeaderMap, now: SystemTime) -> Result<Option<Claims>, BadToken> {
        if self.issuers.is_empty() {
            return Ok(None);
        }
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            // Nobody knows which of them the app will read.
            return Err(BadToken::Several);
        }
        let value = value.as_bytes();
        let Some((scheme, token)) = value.split_at_checked("bearer".len()) else { return Ok(None) };
        if !scheme.eq_ignore_ascii_case(b"bearer") || token.first().is_some_and(u8::is_ascii_alphanumeric) {
            return Ok(None);
        }
        let token = std::str::from_utf8(token.trim_ascii()).map_err(|_| BadToken::Malformed)?;
        self.verify(token, now).map(Some)
    }

    fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, BadToken> {
        if token.len() > MAX_TOKEN {
            return Err(BadToken::TooLong);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(BadToken::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(BadToken::Malformed)?;
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| BadToken::Malformed);
        let header: Header = serde_json::from_slice(&bytes(header)?).map_err(|_| BadToken::Malformed)?;
        let claims: Map<String, Value> = serde_json::from_slice(&bytes(claims)?).map_err(|_| BadToken::Malformed)?;
        let signature = bytes(signature)?;
        if header.crit.is_some() {
            return Err(BadToken::Critical);
        }
        if !["RS256", "ES256", "EdDSA"].contains(&&*header.alg) {
            return Err(BadToken::Algorithm);
        }
        let named = |issuer: &&TokenIssuer| claims.get("iss").and_then(Value::as_str) == Some(&*issuer.issuer);
        let mut known = self.issuers.iter().filter(named).peekable();
        known.peek().ok_or(BadToken::Issuer)?;
        // Several may speak of one issuer: whichever believes it.
        let mut why = BadToken::Key;
        for issuer in known {
            match issuer.signed(&header, signed.as_bytes(), &signature).and_then(|()| check(issuer, &claims, now)) {
                Ok(()) => return Ok(Claims::new(claims)),
                Err(bad) => why = bad,
            }
        }
        Err(why)
    }
}

trait Signed {
    fn signed(&self, header: &Header, message: &[u8], signature: &[u8]) -> Result<(), BadToken>;
}

impl Signed for TokenIssuer {
    fn signed(&self, header: &Header, message: &[u8], signature: &[u8]) -> Result<(), BadToken> {
        let meant = |key: &&PublicKey| {
            let same_name = match (&header.kid, &key.kid) {
                (Some(wanted), Some(kid)) => wanted.as_str() == &**kid,
                _ => true,
            };
            same_name && key.key.algorithm() == header.alg
        };
        let mut keys = self.keys.iter().filter(meant).peekable();
        keys.peek().ok_or(BadToken::Key)?;
        let verifies = |key: &PublicKey| match &key.key {
            KeyMaterial::RS256 { n, e } => {
                let key = RsaPublicKeyComponents { n: &n.0, e: &e.0 };
                key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok()
            }
            KeyMaterial::ES256(point) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point.0).verify(message, signature).is_ok()
            }
            KeyMaterial::EdDSA(point) => UnparsedPublicKey::new(&ED25519, &point.0).verify(message, signature).is_ok(),
        };
        if keys.any(verifies) { Ok(()) } else { Err(BadToken::Signature) }
    }
}

/// What a verified token says of when and for whom it holds.
fn check(issuer: &TokenIssuer, claims: &Map<String, Value>, now: SystemTime) -> Result<(), BadToken> {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let skew = SKEW.as_secs_f64();
    let expires = claims.get("exp").and_then(Value::as_f64).ok_or(BadToken::Unending)?;
    if now >= expires + skew {
        return Err(BadToken::Expired);
    }
    match claims.get("nbf") {
        Some(begins) if begins.as_f64().is_none_or(|begins| now + skew < begins) => return Err(BadToken::Early),
        _ => {}
    }
    let ours = |text: &str| issuer.audiences.iter().any(|audience| **audience == *text);
    let meant = match claims.get("aud") {
        _ if issuer.audiences.is_empty() => true,
        Some(Value::String(one)) => ours(one),
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).any(ours),
        _ => false,
    };
    if meant { Ok(()) } else { Err(BadToken::Audience) }
}

/// The claims of a verified token.
#[derive(Clone, Debug)]
pub struct Claims {
    all: Map<String, Value>,
    /// `ISSUER/SUBJECT`.
    principal: Option<String>,
}

impl Claims {
    pub(super) fn new(all: Map<String, Value>) -> Self {
        let text = |name: &str| all.get(name).and_then(Value::as_str);
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Self { all, principal }
    }

    /// `ISSUER/SUBJECT`, where the token has both.
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// Whether a claim matches, or is a list of which a member does; `None` where it is of a shape that no text can be held
    /// against. Booleans and numbers are held against their text. `scope` is a list with spaces (RFC 8693 §4.2).
    pub fn say(&self, name: &[Arc<str>], glob: &Glob) -> Option<bool> {
        let Some((first, rest)) = name.split_first() else { return Some(false) };
        let mut found = self.all.get(&**first);
        for part in rest {
            found = match found {
                None | Some(Value::Null) => None,
                Some(Value::Object(fields)) => fields.get(&**part),
                // A list of objects, say: one of them may have it.
                Some(_) => return None,
            };
        }
        let Some(found) = found else { return Some(false) };
        match found {
            Value::String(text) if rest.is_empty() && matches!(&**first, "scope" | "permission") => {
                Some(glob.matches(text) || text.split(' ').any(|word| glob.matches(word)))
            }
            Value::Array(list) => {
                let all = || list.iter().map(|one| matches(one, glob));
                if all().any(|one| one == Some(true)) {
                    Some(true)
                } else {
                    all().all(|one| one.is_some()).then_some(false)
                }
            }
            one => matches(one, glob),
        }
    }
}

/// Whether a single value matches, where it has a text.
fn matches(value: &Value, glob: &Glob) -> Option<bool> {
    match value {
        Value::Null => Some(false),
        Value::Bool(value) => Some(glob.matches(if *value { "true" } else { "false" })),
        Value::String(text) => Some(glob.matches(text)),
        Value::Number(number) if number.is_f64() => None,
        Value::Number(number) => Some(glob.matches(&number.to_string())),
        Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
    };
    use http::HeaderValue;
    use serde_json::json;
    use sheetbend_control_plane_client::model::Octets;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    /// Who signs, and what is known of them.
    struct Signer {
        ec: EcdsaKeyPair,
        ed: Ed25519KeyPair,
        rsa: RsaKeyPair,
    }

    fn signer() -> Signer {
        Signer {
            ec: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            ed: Ed25519KeyPair::generate().unwrap(),
            rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
        }
    }

    impl Signer {
        fn issuer(&self, audiences: &[&str]) -> TokenIssuer {
            let public = self.rsa.public_key();
            let key = |kid: &str, key| PublicKey { kid: Some(kid.into()), key };
            let rsa = KeyMaterial::RS256 {
                n: Octets(public.modulus().big_endian_without_leading_zero().into()),
                e: Octets(public.exponent().big_endian_without_leading_zero().into()),
            };
            TokenIssuer {
                issuer: "https://issuer".into(),
                audiences: audiences.iter().map(|audience| Arc::from(*audience)).collect(),
                keys: vec![
                    key("ec", KeyMaterial::ES256(Octets(self.ec.public_key().as_ref().into()))),
                    key("ed", KeyMaterial::EdDSA(Octets(self.ed.public_key().as_ref().into()))),
                    key("rsa", rsa),
                ],
            }
        }

        fn sign(&self, header: Value, claims: &Value) -> String {
            let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let signed = format!("{}.{}", part(&header), part(claims));
            let random = SystemRandom::new();
            let signature = match header["alg"].as_str().unwrap() {
                "ES256" => self.ec.sign(&random, signed.as_bytes()).unwrap().as_ref().to_vec(),
                "EdDSA" => self.ed.sign(signed.as_bytes()).as_ref().to_vec(),
                "RS256" => {
                    let mut signature = vec![0; self.rsa.public_modulus_len()];
                    self.rsa.sign(&RSA_PKCS1_SHA256, &random, signed.as_bytes(), &mut signature).unwrap();
                    signature
                }
                "HS256" => {
                    // Key confusion: the public key, which everybody has, taken for a shared secret.
                    let secret = self.ed.public_key().as_ref();
                    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
                    aws_lc_rs::hmac::sign(&key, signed.as_bytes()).as_ref().to_vec()
                }
                _ => Vec::new(),
            };
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
        }
    }

    fn claims() -> Value {
        json!({"iss": "https://issuer", "sub": "me", "aud": ["web", "db"], "exp": NOW + 600, "nbf": NOW - 10})
    }

    fn with(name: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[name] = value;
        claims
    }

    fn ask(issuers: &[TokenIssuer], authorization: &[&str]) -> Result<Option<String>, BadToken> {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
        let claims = Tokens::new(issuers).claims(&headers, now)?;
        Ok(claims.map(|claims| claims.principal().unwrap_or_default().to_string()))
    }

    #[test]
    fn a_token_of_each_algorithm_is_believed() {
        let signer = signer();
        let issuers = [signer.issuer(&["web"])];
        let me = Ok(Some("https://issuer/me".to_string()));
        for (alg, kid) in [("ES256", "ec"), ("EdDSA", "ed"), ("RS256", "rsa")] {
            let token = signer.sign(json!({"alg": alg, "kid": kid, "typ": "JWT"}), &claims());
            assert_eq!(ask(&issuers, &[&format!("Bearer {token}")]), me, "{alg}");
            assert_eq!(ask(&issuers, &[&format!("bEARER   {token}")]), me, "{alg}");
            let nameless = signer.sign(json!({"alg": alg}), &claims());
            assert_eq!(ask(&issuers, &[&format!("Bearer {nameless}")]), me, "{alg} without a kid");
        }
        for none in ["Basic dTpw", "Bearerx y", "x"] {
            assert_eq!(ask(&issuers, &[none]), Ok(None), "{none}");
        }
        assert_eq!(ask(&issuers, &[]), Ok(None));
        assert_eq!(ask(&[], &["Bearer x"]), Ok(None), "nobody's tokens are looked at");
    }

    #[test]
    fn what_a_stranger_makes_of_a_token_is_refused() {
        let (signer, stranger) = (signer(), signer());
        let issuers = [signer.issuer(&["web"])];
        let header = |alg: &str, kid: &str| json!({"alg": alg, "kid": kid});
        let good = signer.sign(header("EdDSA", "ed"), &claims());
        let (head, rest) = good.split_once('.').unwrap();
        let (body, signature) = rest.split_once('.').unwrap();
        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let forged = URL_SAFE_NO_PAD.encode(with("sub", json!("admin")).to_string());
        for (token, expected) in [
            (format!("{none}.{body}."), BadToken::Algorithm),
            (format!("{none}.{body}.{signature}"), BadToken::Algorithm),
            (signer.sign(header("None", "ed"), &claims()), BadToken::Algorithm),
            (signer.sign(header("HS256", "ed"), &claims()), BadToken::Algorithm),
            (signer.sign(header("eddsa", "ed"), &claims()), BadToken::Algorithm),
            (signer.sign(header("EdDSA", "ec"), &claims()), BadToken::Key),
            (signer.sign(header("EdDSA", "gone"), &claims()), BadToken::Key),
            (stranger.sign(header("EdDSA", "ed"), &claims()), BadToken::Signature),
            (stranger.sign(header("ES256", "ec"), &claims()), BadToken::Signature),
            (stranger.sign(header("RS256", "rsa"), &claims()), BadToken::Signature),
            (format!("{head}.{forged}.{signature}"), BadToken::Signature),
            (format!("{head}.{body}."), BadToken::Signature),
            (signer.sign(json!({"alg": "EdDSA", "crit": ["b64"], "b64": false}), &claims()), BadToken::Critical),
            (signer.sign(header("EdDSA", "ed"), &with("iss", json!("https://other"))), BadToken::Issuer),
            (signer.sign(header("EdDSA", "ed"), &with("iss", json!(["https://issuer"]))), BadToken::Issuer),
            (signer.sign(header("EdDSA", "ed"), &with("exp", json!(NOW - 61))), BadToken::Expired),
            (signer.sign(header("EdDSA", "ed"), &with("exp", json!(null))), BadToken::Unending),
            (signer.sign(header("EdDSA", "ed"), &with("exp", json!("2999"))), BadToken::Unending),
            (signer.sign(header("EdDSA", "ed"), &with("nbf", json!(NOW + 61))), BadToken::Early),
            (signer.sign(header("EdDSA", "ed"), &with("nbf", json!("soon"))), BadToken::Early),
            (signer.sign(header("EdDSA", "ed"), &with("aud", json!("other"))), BadToken::Audience),
            (signer.sign(header("EdDSA", "ed"), &with("aud", json!(null))), BadToken::Audience),
            (signer.sign(header("EdDSA", "ed"), &with("fat", json!("x".repeat(MAX_TOKEN)))), BadToken::TooLong),
            (format!("{good}.x"), BadToken::Malformed),
            (format!("{good}="), BadToken::Malformed),
            (format!("{head}.{body}"), BadToken::Malformed),
            ("..".into(), BadToken::Malformed),
            (String::new(), BadToken::Malformed),
            (format!("{good}, Bearer {good}"), BadToken::Malformed),
        ] {
            assert_eq!(ask(&issuers, &[&format!("Bearer {token}")]), Err(expected), "{token}");
        }
        let good = format!("Bearer {good}");
        assert_eq!(ask(&issuers, &[&good, &good]), Err(BadToken::Several));
        assert!(ask(&issuers, &[&good]).is_ok());
    }

    #[test]
    fn booleans_and_whole_numbers_are_held_against_their_text() {
        let claims =
            json!({"suspended": true, "level": 7, "half": 0.5, "who": {"name": "me"}, "list": ["a", true], "no": null});
        let claims = Claims::new(claims.as_object().unwrap().clone());
        let say = |name: &str, text: &str| claims.say(&[name.into()], &Glob::try_from(text.to_string()).unwrap());
        for (name, text, expected) in [
            ("suspended", "true", Some(true)),
            ("suspended", "false", Some(false)),
            ("level", "7", Some(true)),
            ("level", "70", Some(false)),
            ("list", "true", Some(true)),
            ("list", "b", Some(false)),
            ("half", "0.5", None),
            ("who", "me", None),
            ("no", "null", Some(false)),
            ("none", "x", Some(false)),
        ] {
            assert_eq!(say(name, text), expected, "{name} {text}");
        }
    }
}
