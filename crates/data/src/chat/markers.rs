//! What a template writes around messages, as tokens: which one ends an answer, and which markers are none.

use super::template::ChatTemplate;
use crate::{DataError, Tokenizer};

/// The token that says that an answer is over: what stands behind answers begins with it. `None` where that is spelled out in
/// ordinary tokens, of which none may end a text.
///
/// # Errors
/// If the tokenizer cannot encode it.
pub fn end_of_answer(template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Option<u32>, DataError> {
    let Some(end) = template.end_of_turn() else { return Ok(None) };
    let end = end.trim();
    let ids = tokenizer.encode_template(end)?;
    Ok(ids.first().filter(|&&(id, last)| is_whole(id, end, last, tokenizer)).map(|&(id, _)| id))
}

/// Whether an id is a token for the beginning of a text, up to its byte `last`: an added token, or an ordinary one that is all
/// of it. What a tokenizer does not know is neither.
fn is_whole(id: u32, text: &str, last: usize, tokenizer: &Tokenizer) -> bool {
    let shown = tokenizer.token_text(id);
    let shown = shown.trim_matches(['\u{2581}', ' ']);
    let all = last + 1 == text.len() && text.chars().count() > 1;
    (tokenizer.is_added(id) || all) && text.get(..=last).is_some_and(|part| part == shown)
}

/// Says, where it is so, that a recipe names another template than the one that the model brings. `key` is the setting.
pub(crate) fn other_than_own(template: &ChatTemplate, tokenizer: &Tokenizer, key: &str, name: &str) -> Option<String> {
    tokenizer.chat_template().filter(|own| *own != template.source()).map(|_| {
        format!(
            "{key} = {name:?} is not the model's own template, which {key} = \"tokenizer\" takes: the model learns this one, and \
             is asked in it from now on"
        )
    })
}

/// What there is to know about a template with a tokenizer, in words. `key` is the setting that named it.
///
/// # Errors
/// If the tokenizer cannot encode something.
pub(crate) fn note(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    key: &str,
    name: &str,
) -> Result<Option<String>, DataError> {
    let Some(end) = template.end_of_turn() else { return Ok(None) };
    let mut spelled = Vec::new();
    for marker in markers(&template.probe().unwrap_or_default()) {
        let ids = tokenizer.encode_template(&marker)?;
        let whole = ids.len() == 1 && is_whole(ids[0].0, &marker, ids[0].1, tokenizer);
        if !whole && !spelled.contains(&marker) {
            spelled.push(marker);
        }
    }
    let mut problems = Vec::new();
    if !spelled.is_empty() {
        problems.push(format!("{} are not tokens of the tokenizer and are spelled out", spelled.join(", ")));
    }
    if end_of_answer(template, tokenizer)?.is_none() {
        problems.push(format!("no token ends an answer ({:?} follows it), so that generation does not stop", end));
    }
    if problems.is_empty() {
        return Ok(None);
    }
    let way_out = match name {
        "plain" => "give the tokenizer a token that ends a text",
        _ => "\"plain\" needs no markers and ends answers with the token that ends a text",
    };
    Ok(Some(format!("{key} \"{name}\": {}; {way_out}", problems.join(", and "))))
}

/// `<|...|>` in a text, in order.
fn markers(text: &str) -> Vec<String> {
    let pieces = text.split("<|").skip(1).filter_map(|piece| piece.split_once("|>"));
    let names = pieces.map(|(name, _)| name).filter(|name| !name.contains(char::is_whitespace));
    names.map(|name| format!("<|{name}|>")).collect()
}
