//! Which messages say of themselves that they are to be learned or not: `weight` (OpenAI's and Mistral's format), `train` and
//! `training` (axolotl's), `loss` (ms-swift's).

use serde_json::Value;

use super::numbers;

const NAMES: [&str; 4] = ["weight", "train", "training", "loss"];
/// Say which parts of a message are learned, which we cannot do.
const PARTS: [&str; 2] = ["train_detail", "training_detail"];

/// Whether a message is to be learned, where it says so.
///
/// # Errors
/// If it says something other than yes or no: key and value.
pub(super) fn weight(message: &Value) -> Result<Option<bool>, String> {
    let mut said: Option<(bool, &str)> = None;
    if let Some(key) = PARTS.iter().find(|key| message.get(**key).is_some_and(|value| !value.is_null())) {
        return Err(format!("{key}, which learns parts of a message, where only whole ones are learned or not"));
    }
    for key in NAMES {
        let yes = match message.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(yes)) => *yes,
            Some(Value::Number(number)) if number.as_f64() == Some(0.0) => false,
            Some(Value::Number(number)) if number.as_f64() == Some(1.0) => true,
            Some(other) => {
                let shown = other.as_str().and_then(numbers::literal).map_or(other.to_string(), str::to_owned);
                return Err(format!(
                    "{key} = {shown}, where 0 (not learned) or 1 (learned) belongs: there are no shares"
                ));
            }
        };
        if let Some((other, first)) = said.filter(|(other, _)| *other != yes) {
            return Err(format!("{first} says {other} and {key} says {yes}"));
        }
        said = Some((yes, key));
    }
    Ok(said.map(|(yes, _)| yes))
}
