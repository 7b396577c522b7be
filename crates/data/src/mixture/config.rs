//! The settings of a mixture.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::problem::{Problem, is_default, require};
use crate::source::Source;
use crate::{JsonlConfig, PostsConfig, RustDocsConfig, TextConfig};

/// A mixture: texts of several sources in exact shares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// For a mixture: how long an epoch is. "first_exhausted" (default): until a source has no more documents; "all_exhausted":
    /// until every source has been read whole, smaller ones again and again; a number: so many tokens.
    #[serde(default, skip_serializing_if = "is_default")]
    pub until: Until,
    /// For a mixture: how the last document of a source's share ends. "cut" (default): where the share does; "leave_out": before it,
    /// where it would exceed the share; "overshoot": behind it, as the code of arXiv 2510.13928 has it, which takes documents while
    /// their tokens are at most the share.
    #[serde(default, skip_serializing_if = "is_default")]
    pub last_document: LastDocument,
    /// Texts of several sources, mixed before they are packed: a [[data.source]] each.
    pub source: Vec<MixedSource>,
}

impl MixtureConfig {
    /// What the sources that are trained on are called.
    pub(crate) fn trained_names(&self) -> Vec<String> {
        self.source.iter().filter(|source| source.weight > 0.0).map(|source| source.name().to_owned()).collect()
    }
}

/// A source of a mixture: exactly one of its tables of text is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixedSource {
    /// Its share of the tokens, in relation to the other weights. One of weight 0 is validated on and not trained on. Default: 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// What its loss is called in logs. Default: the name of its table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Text files, as data.text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<TextConfig>,
    /// Rows with a text, as data.jsonl.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jsonl: Option<JsonlConfig>,
    /// The Rust documentation, as data.rust_docs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rust_docs: Option<RustDocsConfig>,
    /// Generated posts, as data.posts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub posts: Option<PostsConfig>,
}

fn one() -> f64 {
    1.0
}

impl MixedSource {
    fn tables(&self) -> Vec<(&'static str, &dyn Source)> {
        let Self { text, jsonl, rust_docs, posts, .. } = self;
        let text = text.as_ref().map(|own| ("text", own as &dyn Source));
        let jsonl = jsonl.as_ref().map(|own| ("jsonl", own as &dyn Source));
        let rust_docs = rust_docs.as_ref().map(|own| ("rust_docs", own as &dyn Source));
        let posts = posts.as_ref().map(|own| ("posts", own as &dyn Source));
        [text, jsonl, rust_docs, posts].into_iter().flatten().collect()
    }

    /// The source and the name of its table.
    ///
    /// # Panics
    /// If it has none, which [`validate`](Self::validate) refuses.
    pub(super) fn table(&self) -> (&'static str, &dyn Source) {
        self.tables().swap_remove(0)
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.table().0)
    }

    pub(super) fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let tables: Vec<&str> = self.tables().into_iter().map(|(name, _)| name).collect();
        require(tables.len() == 1, "", || match &tables[..] {
            [] => "a source of a mixture takes one table with texts: text, jsonl, rust_docs or posts".into(),
            several => format!("a source of a mixture takes one table, and {} are there", several.join(" and ")),
        })?;
        // What lies between is more than any text has tokens.
        let sound = self.weight == 0.0 || (1e-9..=1e9).contains(&self.weight);
        require(sound, "weight", || format!("weight ({:?}) must be 0, or a number from 1e-9 to 1e9", self.weight))?;
        let named = self.name.as_ref().is_none_or(|name| !name.trim().is_empty());
        require(named, "name", || "name is empty: logs call the source by it".into())?;
        let (name, source) = self.table();
        source.validate(seq_len).map_err(|error| error.within(name))
    }
}

/// How long an epoch of a mixture is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Until {
    /// Until the first source has no more documents.
    #[default]
    FirstExhausted,
    /// Until every source has been read whole.
    AllExhausted,
    /// So many tokens.
    Tokens(u64),
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstExhausted => f.write_str("first_exhausted"),
            Self::AllExhausted => f.write_str("all_exhausted"),
            Self::Tokens(tokens) => write!(f, "{tokens}"),
        }
    }
}

impl Serialize for Until {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tokens(tokens) => serializer.serialize_u64(*tokens),
            words => serializer.collect_str(words),
        }
    }
}

impl<'de> Deserialize<'de> for Until {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl Visitor<'_> for Value {
            type Value = Until;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"first_exhausted\", \"all_exhausted\" or a number of tokens")
            }

            fn visit_str<E: Error>(self, words: &str) -> Result<Until, E> {
                let known =
                    [Until::FirstExhausted, Until::AllExhausted].into_iter().find(|one| one.to_string() == words);
                known.ok_or_else(|| E::invalid_value(Unexpected::Str(words), &self))
            }

            fn visit_u64<E: Error>(self, tokens: u64) -> Result<Until, E> {
                Ok(Until::Tokens(tokens))
            }

            fn visit_i64<E: Error>(self, tokens: i64) -> Result<Until, E> {
                let wrong = |_| E::invalid_value(Unexpected::Signed(tokens), &self);
                u64::try_from(tokens).map(Until::Tokens).map_err(wrong)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

impl JsonSchema for Until {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Until".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [{ "type": "string", "enum": ["first_exhausted", "all_exhausted"] }, { "type": "integer", "minimum": 1 }]
        })
    }
}

/// How the last document of a source's share ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LastDocument {
    /// Where the share does.
    #[default]
    Cut,
    /// It is left out where it would exceed the share.
    LeaveOut,
    /// It is taken while the documents before it do not exceed the share.
    Overshoot,
}
