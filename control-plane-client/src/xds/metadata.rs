//! `google.protobuf.Struct` to and from our own types, by way of JSON.

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::DecodeError;

/// Protobuf itself stops at 100 levels; nothing of ours is deeper than four.
const MAX_DEPTH: usize = 16;

/// A value as protobuf. Whole numbers up to 2⁵³ survive, because protobuf knows only doubles.
pub fn to_value<T: Serialize>(value: &T) -> Value {
    // Our types have no maps with keys that are not strings, the only thing that fails here.
    json_to_value(serde_json::to_value(value).unwrap_or_default())
}

/// A value as a protobuf struct; anything that is not one becomes an empty struct.
pub fn to_struct<T: Serialize>(value: &T) -> Struct {
    match to_value(value).kind {
        Some(Kind::StructValue(fields)) => fields,
        _ => Struct::default(),
    }
}

/// Reads one of our types out of a protobuf value. `field` is what an error calls it.
pub fn from_value<T: DeserializeOwned>(value: &Value, field: &'static str) -> Result<T, DecodeError> {
    let json = value_to_json(value, MAX_DEPTH).ok_or_else(|| DecodeError::invalid(field, "it is nested too deeply"))?;
    serde_json::from_value(json).map_err(|error| DecodeError::invalid(field, error))
}

/// Reads one of our types out of a protobuf struct. `field` is what an error calls it.
pub fn from_struct<T: DeserializeOwned>(fields: &Struct, field: &'static str) -> Result<T, DecodeError> {
    let json =
        struct_to_json(fields, MAX_DEPTH).ok_or_else(|| DecodeError::invalid(field, "it is nested too deeply"))?;
    serde_json::from_value(json).map_err(|error| DecodeError::invalid(field, error))
}

fn json_to_value(json: serde_json::Value) -> Value {
    let kind = match json {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        serde_json::Value::String(s) => Kind::StringValue(s),
        serde_json::Value::Array(items) => {
            Kind::ListValue(ListValue { values: items.into_iter().map(json_to_value).collect() })
        }
        serde_json::Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields.into_iter().map(|(name, value)| (name, json_to_value(value))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

fn value_to_json(value: &Value, depth: usize) -> Option<serde_json::Value> {
    let depth = depth.checked_sub(1)?;
    Some(match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(b)) => (*b).into(),
        Some(Kind::NumberValue(n)) => number(*n),
        Some(Kind::StringValue(s)) => s.as_str().into(),
        Some(Kind::ListValue(list)) => {
            serde_json::Value::Array(list.values.iter().map(|v| value_to_json(v, depth)).collect::<Option<_>>()?)
        }
        Some(Kind::StructValue(fields)) => struct_to_json(fields, depth)?,
    })
}

fn struct_to_json(fields: &Struct, depth: usize) -> Option<serde_json::Value> {
    let fields = fields.fields.iter().map(|(name, value)| Some((name.clone(), value_to_json(value, depth)?)));
    Some(serde_json::Value::Object(fields.collect::<Option<_>>()?))
}

/// Whole numbers become integers, so that a port reads as one.
fn number(n: f64) -> serde_json::Value {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: up to here a double holds every whole number
    match n.fract() == 0.0 && n.abs() <= EXACT {
        true => (n as i64).into(),
        false => n.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_travelled_as_a_double_is_a_port_again() {
        let there = to_struct(&serde_json::json!({"port": 65535, "share": 0.5}));
        let back: serde_json::Value = from_struct(&there, "test").unwrap();
        assert_eq!(back, serde_json::json!({"port": 65535, "share": 0.5}));
    }

    #[test]
    fn what_is_nested_too_deeply_is_refused_rather_than_followed() {
        let mut value = Value { kind: Some(Kind::BoolValue(true)) };
        for _ in 0..90 {
            value = Value { kind: Some(Kind::ListValue(ListValue { values: vec![value] })) };
        }
        let error = from_value::<serde_json::Value>(&value, "test").unwrap_err();
        assert!(error.to_string().contains("too deeply"), "{error}");
    }
}
