//! Settings that may be typed as flags or written as a table.

use clap::{Args, Command};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// The flags that give these settings, without those that say what `default` says.
pub fn flags_of<T: Serialize>(settings: &T, default: &T) -> String {
    let table = |settings: &T| toml::Table::try_from(settings).unwrap_or_default();
    let default = table(default);
    let changed = table(settings).into_iter().filter(|(key, value)| default.get(key) != Some(value));
    let flag = |(key, value): (String, toml::Value)| {
        let name = key.replace('_', "-");
        match value {
            toml::Value::Boolean(_) => format!("--{name}"),
            toml::Value::String(word) => format!("--{name} {word}"),
            other => format!("--{name} {other}"),
        }
    };
    changed.map(flag).collect::<Vec<_>>().join(" ")
}

/// The settings that flags give.
///
/// # Errors
/// The first line of what is wrong with them.
pub fn parse_flags<T: Args>(flags: &str) -> Result<T, String> {
    let command = T::augment_args(Command::new("").no_binary_name(true).disable_help_flag(true));
    let matches = command.try_get_matches_from(flags.split_whitespace());
    matches.and_then(|matches| T::from_arg_matches(&matches)).map_err(|error| {
        let words = error.to_string();
        words.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
    })
}

/// Settings written as a table or, as they were until now, as flags in one string.
///
/// # Errors
/// If they are neither.
pub fn table_or_flags<'de, D: Deserializer<'de>, T: Args + DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    use serde::de::Error;
    match toml::Value::deserialize(from)? {
        toml::Value::String(flags) => parse_flags(&flags).map(Some).map_err(D::Error::custom),
        table => table.try_into().map(Some).map_err(|error: toml::de::Error| D::Error::custom(error.message())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{Conversion, Growth};

    #[test]
    fn a_table_and_its_flags_say_the_same() {
        #[derive(Deserialize)]
        struct Both {
            #[serde(deserialize_with = "table_or_flags")]
            convert: Option<Conversion>,
            #[serde(deserialize_with = "table_or_flags")]
            grow: Option<Growth>,
        }
        let flags = "--to decoupled_head --kv-heads 2 --search dynamic --fusing";
        let written = format!("convert = \"{flags}\"\ngrow = \"--signal-heads x4 --noise 0\"");
        let table = "convert = { to = \"decoupled_head\", kv_heads = 2, fusing = true, search = \"dynamic\" }\n\
                     grow = { signal_heads = 4, noise = 0.0 }";
        let [a, b]: [Both; 2] = [&written, table].map(|text| toml::from_str(text).unwrap());
        assert_eq!((&a.convert, &a.grow), (&b.convert, &b.grow));
        assert_eq!(a.convert.unwrap().flags(), flags);
        assert_eq!(flags_of(&a.grow.unwrap(), &Growth::default()), "--signal-heads 4 --noise 0.0");
        let wrong = toml::from_str::<Both>("convert = \"--to nothing\"\ngrow = \"\"").err().unwrap().to_string();
        assert!(wrong.contains("nothing"), "{wrong}");
    }
}
