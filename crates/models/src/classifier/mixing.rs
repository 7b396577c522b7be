//! What mixes the patches of a picture: any mechanism of the table, or HiLo, which needs to know the grid that they form.
//!
//! In a recipe both stand in one place, `attention.<name>`, so that either can take the other's.

use std::borrow::Cow;
use std::fmt;

use polyhead_attention::{AttentionConfig, ConfigError, Dims, HiLoConfig};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::EnumAccessDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, MapAccess, VariantAccess, Visitor,
};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

const HILO: &str = "hilo";

/// What mixes the patches of a picture.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerConfig {
    /// A mechanism of the table, both ways.
    Mechanism(AttentionConfig),
    /// HiLo.
    HiLo(HiLoConfig),
}

impl MixerConfig {
    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mechanism(mechanism) => mechanism.name(),
            Self::HiLo(_) => HILO,
        }
    }

    /// Checks everything that a user can get wrong about a layer.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        match self {
            Self::Mechanism(mechanism) => mechanism.validate(dims),
            Self::HiLo(hilo) => hilo.validate(dims.d_model).map_err(|error| error.within(HILO)),
        }
    }
}

impl Serialize for MixerConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Mechanism(mechanism) => mechanism.serialize(serializer),
            Self::HiLo(hilo) => {
                let mut table = serializer.serialize_map(Some(1))?;
                table.serialize_entry(HILO, hilo)?;
                table.end()
            }
        }
    }
}

// By hand rather than `serde(untagged)`, which would hide which key is wrong.
impl<'de> Deserialize<'de> for MixerConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneTable;
        impl<'de> Visitor<'de> for OneTable {
            type Value = MixerConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table with the name of a mechanism")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let name: String = map.next_key()?.ok_or_else(|| A::Error::custom("attention is empty: name one"))?;
                let mixer = match name.as_str() {
                    HILO => MixerConfig::HiLo(map.next_value()?),
                    name => MixerConfig::Mechanism(map.next_value_seed(MechanismOf(name))?),
                };
                match map.next_key::<String>()? {
                    None => Ok(mixer),
                    Some(other) => {
                        let problem = format!("attention names two mechanisms, {name} and {other}: choose one");
                        Err(A::Error::custom(problem))
                    }
                }
            }
        }
        deserializer.deserialize_map(OneTable)
    }
}

/// Reads the table of the mechanism of a name that has been read already.
struct MechanismOf<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for MechanismOf<'_> {
    type Value = AttentionConfig;

    fn deserialize<D: Deserializer<'de>>(self, table: D) -> Result<AttentionConfig, D::Error> {
        AttentionConfig::deserialize(EnumAccessDeserializer::new(Named(self.0, table)))
    }
}

/// A name with its table, as a variant of an enum.
struct Named<'a, D>(&'a str, D);
struct Table<D>(D);

impl<'de, D: Deserializer<'de>> EnumAccess<'de> for Named<'_, D> {
    type Error = D::Error;
    type Variant = Table<D>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Table<D>), D::Error> {
        Ok((seed.deserialize(self.0.into_deserializer())?, Table(self.1)))
    }
}

impl<'de, D: Deserializer<'de>> VariantAccess<'de> for Table<D> {
    type Error = D::Error;

    fn unit_variant(self) -> Result<(), D::Error> {
        Err(D::Error::custom("a mechanism has a table of settings"))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, D::Error> {
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, D::Error> {
        self.unit_variant().and_then(|()| Err(D::Error::custom("no list")))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }
}

impl JsonSchema for MixerConfig {
    fn schema_name() -> Cow<'static, str> {
        "MixerConfig".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (mechanism, hilo) = (generator.subschema_for::<AttentionConfig>(), generator.subschema_for::<HiLoConfig>());
        let words = "HiLo: windows for high frequencies, their means for low ones; for pooling without a class token.";
        schemars::json_schema!({ "anyOf": [mechanism, {
            "type": "object", "description": words, "properties": { "hilo": hilo },
            "required": ["hilo"], "additionalProperties": false
        }] })
    }
}
