//! A setting that is the same in all layers, or given layer by layer.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};

/// One table for all layers, or a list with one table per layer.
#[derive(Debug, Clone, PartialEq)]
pub enum PerLayer<T> {
    /// The same in all layers.
    Same(T),
    /// The first layer's, the second layer's, ...
    Each(Vec<T>),
}

impl<T> PerLayer<T> {
    /// The setting of a layer, counted from 0. `None` where the list is too short.
    pub fn of_layer(&self, layer: usize) -> Option<&T> {
        match self {
            Self::Same(setting) => Some(setting),
            Self::Each(settings) => settings.get(layer),
        }
    }

    /// The settings as they are written: one for all layers, or one for each.
    pub fn written(&self) -> &[T] {
        match self {
            Self::Same(setting) => std::slice::from_ref(setting),
            Self::Each(settings) => settings,
        }
    }

    /// The same for something made of each setting.
    pub fn map<U>(self, make: impl FnMut(T) -> U) -> PerLayer<U> {
        let mut make = make;
        match self {
            Self::Same(setting) => PerLayer::Same(make(setting)),
            Self::Each(settings) => PerLayer::Each(settings.into_iter().map(make).collect()),
        }
    }
}

impl<T: Serialize> Serialize for PerLayer<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Same(setting) => setting.serialize(serializer),
            Self::Each(settings) => settings.serialize(serializer),
        }
    }
}

// By hand rather than `serde(untagged)`, which would hide which key is wrong.
impl<'de, T: Deserialize<'de>> Deserialize<'de> for PerLayer<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TableOrList<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for TableOrList<T> {
            type Value = PerLayer<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table, or a list of tables with one per layer")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(PerLayer::Same)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(PerLayer::Each)
            }
        }
        deserializer.deserialize_any(TableOrList(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for PerLayer<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("PerLayer_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<T>();
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}
