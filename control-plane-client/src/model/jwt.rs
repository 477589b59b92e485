//! Whose tokens are believed: issuers and their public keys (RFC 7517), in the words of Istio's RequestAuthentication.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Unusable;

/// Keys of one issuer at most: a token that names none of them is held against all of its kind.
pub const MAX_KEYS: usize = 32;

/// One of `jwtRules`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TokenIssuer {
    /// What `iss` must be, word for word.
    pub issuer: Arc<str>,
    /// One of these must be in `aud`; none: any will do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audiences: Vec<Arc<str>>,
    /// Whose signatures are believed.
    pub keys: Vec<PublicKey>,
}

/// A public key, with the one algorithm that it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublicKey {
    /// Its name; without one it may be meant by any token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<Arc<str>>,
    /// The key itself.
    pub key: KeyMaterial,
}

/// The numbers of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyMaterial {
    /// RSASSA-PKCS1-v1_5 with SHA-256: modulus and exponent.
    RS256 {
        /// The modulus, big-endian.
        n: Octets,
        /// The exponent, big-endian.
        e: Octets,
    },
    /// ECDSA with P-256 and SHA-256: an uncompressed point.
    ES256(Octets),
    /// Ed25519.
    EdDSA(Octets),
}

impl KeyMaterial {
    /// `alg` of tokens that it verifies.
    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::RS256 { .. } => "RS256",
            Self::ES256(_) => "ES256",
            Self::EdDSA(_) => "EdDSA",
        }
    }
}

/// Bytes, written in base64url.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Octets(pub Vec<u8>);

impl fmt::Debug for Octets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(&self.0))
    }
}

impl TryFrom<String> for Octets {
    type Error = base64::DecodeError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        URL_SAFE_NO_PAD.decode(text).map(Self)
    }
}

impl From<Octets> for String {
    fn from(bytes: Octets) -> Self {
        URL_SAFE_NO_PAD.encode(bytes.0)
    }
}

/// The keys of a JSON Web Key Set that can verify here. Others, for encryption say, are left out; what must not be shown
/// to anybody is refused, and so is a set of which nothing is left.
///
/// # Errors
///
/// Why not, in words.
pub fn read_keys(text: &str) -> Result<Vec<PublicKey>, String> {
    let set: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let keys = set.get("keys").and_then(Value::as_array).ok_or("no list `keys`: a JSON Web Key Set has one")?;
    let mut found = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        let key = key.as_object().ok_or(format!("keys[{number}] is no object"))?;
        found.extend(read_key(key).map_err(|why| format!("keys[{number}]: {why}"))?);
    }
    match found.len() {
        0 => Err("no key of RS256, ES256 or EdDSA".into()),
        many if many > MAX_KEYS => Err(format!("{many} keys, {MAX_KEYS} at most")),
        _ => Ok(found),
    }
}

fn read_key(key: &Map<String, Value>) -> Result<Option<PublicKey>, String> {
    let text = |name: &str| key.get(name).and_then(Value::as_str);
    let kind = text("kty").ok_or("no `kty`")?;
    if kind == "oct" || key.contains_key("k") {
        return Err("a shared secret verifies nothing here: RS256, ES256 and EdDSA have public keys".into());
    }
    if ["d", "p", "q"].iter().any(|secret| key.contains_key(*secret)) {
        return Err("a private key: give the public half alone, and replace this one".into());
    }
    let octets = |name: &str| {
        let bytes = text(name).ok_or(format!("no `{name}`"))?;
        URL_SAFE_NO_PAD.decode(bytes).map_err(|_| format!("`{name}` is not base64url"))
    };
    let (algorithm, curve) = (text("alg"), text("crv"));
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return Ok(None);
    }
    let key = match (kind, curve) {
        ("RSA", _) if algorithm.is_none_or(|name| name == "RS256") => {
            // RFC 7518 §6.3.1.1 has no zeros before a number; some write one.
            let number = |name| octets(name).map(|bytes| bytes.into_iter().skip_while(|byte| *byte == 0).collect());
            KeyMaterial::RS256 { n: Octets(number("n")?), e: Octets(number("e")?) }
        }
        ("EC", Some("P-256")) if algorithm.is_none_or(|name| name == "ES256") => {
            let (x, y) = (octets("x")?, octets("y")?);
            KeyMaterial::ES256(Octets([&[4][..], &x, &y].concat()))
        }
        ("OKP", Some("Ed25519")) if algorithm.is_none_or(|name| matches!(name, "EdDSA" | "Ed25519")) => {
            KeyMaterial::EdDSA(Octets(octets("x")?))
        }
        _ => return Ok(None),
    };
    let key = PublicKey { kid: text("kid").map(Arc::from), key };
    key.check()?;
    Ok(Some(key))
}

impl PublicKey {
    /// Whether tokens can be held against it, as those are that come.
    fn check(&self) -> Result<(), String> {
        let parsed = match &self.key {
            KeyMaterial::RS256 { n, e } => {
                let bits = n.0.first().map_or(0, |first| 8 * n.0.len() - first.leading_zeros() as usize);
                if !(2048..=8192).contains(&bits) {
                    return Err(format!("an RSA key of {bits} bits: 2048 to 8192 are believed"));
                }
                let key = RsaPublicKeyComponents { n: &n.0, e: &e.0 };
                AsDer::<PublicKeyX509Der<'_>>::as_der(&key)
                    .is_ok_and(|key| ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.as_ref()).is_ok())
            }
            KeyMaterial::ES256(point) => ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point.0).is_ok(),
            KeyMaterial::EdDSA(point) => ParsedPublicKey::new(&ED25519, &point.0).is_ok(),
        };
        if parsed { Ok(()) } else { Err(format!("not a key of {}", self.key.algorithm())) }
    }
}

impl TokenIssuer {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        if self.issuer.is_empty() {
            return Err(Unusable::new("issuer", "a token is believed by its issuer's name"));
        }
        if self.keys.is_empty() || self.keys.len() > MAX_KEYS {
            return Err(Unusable::new("jwks", format!("{} keys: 1 to {MAX_KEYS} are needed", self.keys.len())));
        }
        self.keys.iter().try_for_each(PublicKey::check).map_err(|why| Unusable::new("jwks", why))
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};

    use super::*;

    #[test]
    fn a_set_gives_the_keys_that_can_verify_and_none_that_must_stay_secret() {
        let (rsa, ec, ed) = keys();
        let (rsa_n, ec_x, ed_x) = (of(&rsa, "n"), of(&ec, "x"), of(&ed, "x"));
        let for_encryption = rsa.replace("\"kid\"", "\"use\":\"enc\",\"kid\"");
        let other = rsa.replace("\"kid\"", "\"alg\":\"RS512\",\"kid\"");
        let set = format!(r#"{{"keys":[{rsa},{ec},{ed},{for_encryption},{other},{{"kty":"new"}}]}}"#);
        let keys = read_keys(&set).unwrap();
        let algorithms: Vec<_> = keys.iter().map(|key| key.key.algorithm()).collect();
        assert_eq!(algorithms, ["RS256", "ES256", "EdDSA"]);
        let travels: Vec<PublicKey> = serde_json::from_str(&serde_json::to_string(&keys).unwrap()).unwrap();
        assert_eq!(travels, keys);
        for (wrong, why) in [
            ("{", "not JSON"),
            ("{}", "no list `keys`"),
            (r#"{"keys":[]}"#, "no key of"),
            (r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#, "shared secret"),
            (&one(ed.replace("\"alg\"", "\"d\":\"x\",\"alg\"")), "private key"),
            (&one(rsa.replace(&rsa_n, &URL_SAFE_NO_PAD.encode([255; 128]))), "1024 bits"),
            (&one(rsa.replace(&rsa_n, &URL_SAFE_NO_PAD.encode([&[127][..], &[255; 255]].concat()))), "2047 bits"),
            (&one(rsa.replace("AQAB", "")), "not a key of RS256"),
            (&one(rsa.replace("AQAB", "AA")), "not a key of RS256"),
            (&one(ec.replace(&ec_x, &ed_x)), "not a key of ES256"),
            (&one(ed.replace(&ed_x, &URL_SAFE_NO_PAD.encode([255; 31]))), "not a key of EdDSA"),
        ] {
            let refused = read_keys(wrong).expect_err(wrong);
            assert!(refused.contains(why), "{wrong}: {refused}");
        }
    }

    #[test]
    fn zeros_before_a_number_say_nothing() {
        let (rsa, ..) = keys();
        let n = URL_SAFE_NO_PAD.decode(of(&rsa, "n")).unwrap();
        let led =
            rsa.replace(&of(&rsa, "n"), &URL_SAFE_NO_PAD.encode([&[0][..], &n].concat())).replace("AQAB", "AAEAAQ");
        assert_ne!(led, rsa);
        assert_eq!(read_keys(&one(led)).unwrap(), read_keys(&one(rsa)).unwrap());
    }

    fn one(key: String) -> String {
        format!(r#"{{"keys":[{key}]}}"#)
    }

    /// A member of a key.
    fn of(key: &str, name: &str) -> String {
        serde_json::from_str::<Value>(key).unwrap()[name].as_str().unwrap().to_string()
    }

    /// One of each algorithm.
    fn keys() -> (String, String, String) {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let ed = Ed25519KeyPair::generate().unwrap();
        let (n, point) = (rsa.public_key().modulus(), ec.public_key().as_ref());
        (
            format!(r#"{{"kty":"RSA","kid":"a","n":"{}","e":"AQAB"}}"#, text(n.big_endian_without_leading_zero())),
            format!(r#"{{"kty":"EC","crv":"P-256","x":"{}","y":"{}"}}"#, text(&point[1..33]), text(&point[33..])),
            format!(r#"{{"kty":"OKP","crv":"Ed25519","alg":"EdDSA","x":"{}"}}"#, text(ed.public_key().as_ref())),
        )
    }
}
