//! Conversations from files to batches.

use std::sync::Arc;

use super::read::{Counts, notes, read_chats};
use super::rows::ChatRows;
use super::split::ChatSplit;
use super::{ChatConfig, ChatTokens, note, other_than_own};
use crate::batches::{LoaderOptions, Order, Samples, first_rows};
use crate::{Data, DataError, Loader, Opened, Opening};

/// Reads the conversations of a data set, divides them and packs them into rows.
///
/// # Errors
/// As [`read_chats`], or if there are too few conversations.
pub(super) fn open(config: &ChatConfig, opening: Opening<'_>) -> Result<Data, DataError> {
    let Opening { tokenizer, options, .. } = opening;
    let (chats, counts) = read_chats(config, tokenizer, options.seq_len)?;
    let template = config.template(tokenizer)?;
    let (rows, hashes, hash) = hashes(&chats);
    let own = rows.partition_point(|&row| row < counts.rows - counts.held_out);
    let fraction = (counts.held_out == 0).then_some(options.validation_fraction);
    let sides = ChatSplit::of(&hashes[..own], fraction, options.tracking.map(|tracking| tracking.fraction))?;
    let place = |index: usize| rows.partition_point(|&row| row < chats[index].row);
    let chosen =
        |side: &dyn Fn(usize) -> bool| (0..chats.len()).filter(|&index| side(place(index))).collect::<Vec<_>>();
    let train = chosen(&|row| !sides.held_out(row) && !sides.tracked(row));
    let (validation, tracked) = (chosen(&|row| sides.held_out(row)), chosen(&|row| sides.tracked(row)));
    for (what, empty) in [
        ("to train on", train.is_empty()),
        ("to validate on", validation.is_empty()),
        ("for tracking", options.tracking.is_some() && tracked.is_empty()),
    ] {
        if empty {
            return Err(unusable!(
                "data.chat: of {} conversations none is left {what}, as validation and tracking take their own: give more",
                chats.len()
            ));
        }
    }
    let sizes = [train.len(), validation.len(), tracked.len()];
    let chats = Arc::new(chats);
    let rows = |which, pack| ChatRows::new(chats.clone(), which, (options.seq_len, pack, tokenizer.pad()));
    let [train, validation] = [train, validation].map(|which| rows(which, config.pack));
    let mut description = described(&chats, &counts, sizes, &train);
    if options.tracking.is_some() {
        description += &format!(", {} for tracking", sizes[2]);
    }
    let several = (counts.several > 0).then(|| {
        format!(
            "{} conversations are split into several samples ({} in all): the template renders their answers differently once \
             more messages follow, so each is trained on as the model has to write it",
            counts.several,
            chats.len()
        )
    });
    let markers = note(&template, tokenizer, "data.chat.template", &config.template)?;
    let other = other_than_own(&template, tokenizer, "data.chat.template", &config.template);
    let (bytes, unknown) = tokenizer.token_bytes_of_sample();
    let notes = several.into_iter().chain(other).chain(markers).chain(unknown).chain(notes(config, &counts, &template));
    let loader = |rows, order| Loader::new(Arc::new(rows), bytes.clone(), LoaderOptions::of(options, order));
    let most = options.tracking.map_or(0, |tracking| tracking.texts as u64);
    Ok(Data::Tokens(Box::new(Opened {
        train: loader(train, Order::Shuffled),
        validation: loader(validation, Order::Once),
        tracking: first_rows(&rows(tracked, false), most)?,
        vocab_size: tokenizer.vocab_size(),
        // Whoever uses the model has to write as it has learned to read.
        tokenizer: Some(tokenizer.clone().with_chat_template(template.source().to_owned())),
        description,
        notes: notes.chain(counts.left_out).collect(),
        text_hash: Some(hash),
        floor: None,
    })))
}

/// The rows of files that conversations are from, the hash of each, and that of all. Conversations of one row are on one side:
/// its hash is that of its first.
fn hashes(chats: &[ChatTokens]) -> (Vec<usize>, Vec<u64>, String) {
    let mut hash = blake3::Hasher::new();
    let (mut rows, mut hashes) = (Vec::new(), Vec::new());
    for chat in chats {
        let ids: Vec<u8> = chat.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        hash.update(&(ids.len() as u64).to_le_bytes()).update(&ids);
        if rows.last() != Some(&chat.row) {
            rows.push(chat.row);
            let own = blake3::hash(&ids);
            hashes.push(u64::from_le_bytes(std::array::from_fn(|i| own.as_bytes()[i])));
        }
    }
    (rows, hashes, hash.finalize().to_hex().to_string())
}

/// What the data is, in words.
fn described(chats: &[ChatTokens], counts: &Counts, [train, validation, _]: [usize; 3], rows: &ChatRows) -> String {
    let mut left_out = String::new();
    for (count, what) in [
        (counts.bad, "bad rows skipped"),
        (counts.weightless, "with nothing to train on"),
        (counts.dropped, "too long, dropped"),
        (counts.truncated, "too long, cut"),
    ] {
        if count > 0 {
            left_out.push_str(&format!(", {count} {what}"));
        }
    }
    let tokens: usize = chats.iter().map(|chat| chat.tokens.len()).sum();
    let learned = chats.iter().flat_map(|chat| &chat.learned).filter(|&&learned| learned).count();
    format!(
        "{} rows of chat{left_out}: {tokens} tokens, {learned} of them learned; {train} conversations for training in {} rows \
         ({:.0} % padding), {validation} for validation",
        counts.rows,
        rows.per_epoch(),
        100.0 * rows.padding()
    )
}
