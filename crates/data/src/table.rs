//! `[data]` as it is written: the table of one source, or the keys of a mixture.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::Single;
use crate::{DataConfig, MixtureConfig};

/// The keys of a mixture; all others are sources.
pub const MIXTURE: [&str; 3] = ["until", "last_document", "source"];

impl<'de> Deserialize<'de> for DataConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Table)
    }
}

struct Table;

impl<'de> Visitor<'de> for Table {
    type Value = DataConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table with one source of data")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DataConfig, A::Error> {
        let first: Option<String> = map.next_key()?;
        let is_mixture = first.as_deref().is_some_and(|key| MIXTURE.contains(&key));
        let map = MapAccessDeserializer::new(Peeked { first, map });
        match is_mixture {
            true => MixtureConfig::deserialize(map).map(DataConfig::Mixture),
            false => Single::deserialize(map).map(DataConfig::from),
        }
    }
}

/// A map of which the first key has been read.
struct Peeked<A> {
    first: Option<String>,
    map: A,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Peeked<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        match self.first.take() {
            Some(key) => seed.deserialize(key.into_deserializer()).map(Some),
            None => self.map.next_key_seed(seed),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

impl JsonSchema for DataConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DataConfig".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (mut schema, mixture) = (Single::json_schema(generator), MixtureConfig::json_schema(generator));
        if let Some(Value::Array(tables)) = schema.ensure_object().get_mut("oneOf") {
            tables.push(mixture.into());
        }
        schema
    }
}
