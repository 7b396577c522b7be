//! What keys there are: read off the types, for finding unknown keys and naming the nearest valid one.

use std::sync::OnceLock;

use serde_json::Value;

use crate::layers::{self, Layer};
use crate::nearest::nearest;
use crate::problem::{Problem, Problems};
use crate::settings::Recipe;

/// What other trainers (Hugging Face, axolotl, litgpt, LLaMA-Factory, nanoGPT) call our keys.
const ELSEWHERE: [(&str, &str); 34] = [
    ("hidden_size", "model.decoder.d_model"),
    ("n_embd", "model.decoder.d_model"),
    ("num_hidden_layers", "model.decoder.n_layers"),
    ("n_layer", "model.decoder.n_layers"),
    ("num_attention_heads", "n_heads of the attention table"),
    ("n_head", "n_heads of the attention table"),
    ("num_key_value_heads", "n_kv_heads of the attention table"),
    ("n_query_groups", "n_kv_heads of the attention table"),
    ("num_noise_heads", "n_noise_heads of the attention table"),
    ("intermediate_size", "model.decoder.d_ff"),
    ("tie_word_embeddings", "model.decoder.tie_embeddings"),
    ("rms_norm_eps", "model.decoder.norm_eps"),
    ("learning_rate", "optimizer.adamw.lr"),
    ("lr", "optimizer.adamw.lr"),
    ("weight_decay", "optimizer.adamw.weight_decay"),
    ("adam_beta1", "optimizer.adamw.beta1"),
    ("adam_beta2", "optimizer.adamw.beta2"),
    ("adam_epsilon", "optimizer.adamw.eps"),
    ("max_steps", "training.steps"),
    ("max_iters", "training.steps"),
    ("micro_batch_size", "training.batch_size"),
    ("per_device_train_batch_size", "training.batch_size"),
    ("sequence_len", "training.seq_len"),
    ("block_size", "training.seq_len"),
    ("cutoff_len", "training.seq_len"),
    ("max_seq_length", "training.seq_len"),
    ("gradient_clip_val", "training.max_norm"),
    ("max_grad_norm", "training.max_norm"),
    ("warmup_steps", "lr_scheduler.warmup_steps"),
    ("lr_scheduler_type", "lr_scheduler.decay"),
    ("logging_steps", "metrics.log_freq"),
    ("save_steps", "checkpoint.interval"),
    ("eval_steps", "validation.interval"),
    ("seed", "debug.seed"),
];

/// Unknown keys that are told one by one, each with the nearest valid one; of more there is the number. Chosen by us.
const MOST_UNKNOWN: usize = 100;

/// The schema of a recipe.
pub fn recipe() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(Recipe).to_value())
}

/// Keys of the layers that no type has, each with the nearest valid one.
pub fn unknown_keys(layers: &[Layer]) -> Vec<Problem> {
    unknown_keys_of(recipe(), layers)
}

/// The same for files of another schema.
pub fn unknown_keys_of(root: &Value, layers: &[Layer]) -> Vec<Problem> {
    let (mut found, mut more) = (Vec::new(), 0);
    for layer in layers {
        let mut report = |path: &str, fault: Fault<'_>, valid: &dyn Fn() -> Vec<String>| {
            if found.len() == MOST_UNKNOWN {
                more += 1;
                return;
            }
            let at = |message: String| layers::at(std::slice::from_ref(layer), path, message);
            found.push(match fault {
                Fault::Key(key) => {
                    let table = path.rsplit_once('.').map_or("the top level", |(table, _)| table);
                    at(format!("unknown key `{key}` in {table}")).hint(Some(suggestion(root, key, &valid())))
                }
                Fault::Word(word) => {
                    let message = format!("{path} takes a table, where the word \"{word}\" is");
                    at(message).hint(Some(table_for(path, word, valid())))
                }
            });
        };
        walk(root, &[root], layer.values(), "", &mut report);
    }
    if more > 0 {
        found.extend(Problems::plain(format!("{more} more unknown keys")).0);
    }
    found
}

/// What is wrong with a key, apart from its value's type.
enum Fault<'a> {
    /// No type has it.
    Key(&'a str),
    /// It holds a word, where one of several tables belongs.
    Word(&'a str),
}

/// How one of several tables is chosen, for those who wrote its name as a word.
fn table_for(path: &str, word: &str, mut valid: Vec<String>) -> String {
    valid.sort_unstable();
    valid.dedup();
    let near = nearest(word, &valid);
    let example = near.or(valid.first()).map_or("...", String::as_str);
    let like = if near.is_some() { "write" } else { "write, for instance," };
    format!("{like} {path}.{example}={{}} (valid here: {})", valid.join(", "))
}

/// Takes what is wrong: the path, what it is, and what gives the names that are valid there.
type Report<'a> = dyn FnMut(&str, Fault<'_>, &dyn Fn() -> Vec<String>) + 'a;

fn walk(root: &Value, schemas: &[&Value], table: &toml::Table, path: &str, report: &mut Report<'_>) {
    let variants: Vec<&Value> = schemas.iter().flat_map(|schema| variants(root, schema)).collect();
    let known = || variants.iter().filter_map(|schema| schema.get("properties")?.as_object());
    if known().next().is_none() {
        return; // not a table at all: the type error says so
    }
    for (key, value) in table {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let inner: Vec<&Value> = known().filter_map(|properties| properties.get(key)).collect();
        if inner.is_empty() {
            report(&path, Fault::Key(key), &|| known().flat_map(|properties| properties.keys().cloned()).collect());
            continue;
        }
        let items = || -> Vec<&Value> {
            let variants = inner.iter().flat_map(|schema| self::variants(root, schema));
            variants.filter_map(|schema| schema.get("items")).collect()
        };
        match value {
            // Items of a list by their places, as in `data.source.0.weight`.
            toml::Value::Table(places) if places.keys().all(|key| key.parse::<usize>().is_ok()) => {
                for (index, item) in places.iter().filter_map(|(index, item)| Some((index, item.as_table()?))) {
                    walk(root, &items(), item, &format!("{path}.{index}"), report);
                }
            }
            toml::Value::Table(table) => walk(root, &inner, table, &path, report),
            toml::Value::Array(list) => {
                for (index, item) in list.iter().enumerate() {
                    if let toml::Value::Table(table) = item {
                        walk(root, &items(), table, &format!("{path}.{index}"), report);
                    }
                }
            }
            toml::Value::String(word) => {
                let inner: Vec<&Value> = inner.iter().flat_map(|schema| self::variants(root, schema)).collect();
                let inner: Vec<&Value> = inner.into_iter().filter(|schema| schema["type"] != "null").collect();
                let tables: Vec<_> = inner.iter().filter_map(|schema| schema.get("properties")?.as_object()).collect();
                // A choice between tables has one key in each of them, but for mixtures of data.
                let choice = tables.iter().filter(|keys| keys.len() == 1).count() > 1;
                if choice && tables.len() == inner.len() {
                    let single = || tables.iter().filter(|keys| keys.len() == 1);
                    report(&path, Fault::Word(word), &|| single().flat_map(|keys| keys.keys().cloned()).collect());
                }
            }
            _ => {}
        }
    }
}

/// A schema with references followed and alternatives laid side by side.
pub fn variants<'a>(root: &'a Value, schema: &'a Value) -> Vec<&'a Value> {
    let target =
        schema.get("$ref").and_then(Value::as_str).and_then(|reference| root.pointer(reference.strip_prefix('#')?));
    if let Some(target) = target {
        return variants(root, target);
    }
    for word in ["oneOf", "anyOf", "allOf"] {
        if let Some(list) = schema.get(word).and_then(Value::as_array) {
            return list.iter().flat_map(|schema| variants(root, schema)).collect();
        }
    }
    vec![schema]
}

fn suggestion(root: &Value, key: &str, valid: &[String]) -> String {
    let mut places = Vec::new();
    find_key(root, root, "", key, &mut places);
    if !places.is_empty() {
        return format!("its place is {}", places.join(" or "));
    }
    if let Some(name) = nearest(key, valid) {
        return format!("did you mean `{name}`?");
    }
    if let Some((_, ours)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == key) {
        return format!("here it is called {ours}");
    }
    let mut names: Vec<&str> = valid.iter().map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    format!("valid here: {}", names.join(", "))
}

/// Where a key of that name is valid, as dotted paths.
fn find_key(root: &Value, schema: &Value, path: &str, key: &str, places: &mut Vec<String>) {
    for variant in variants(root, schema) {
        for (name, property) in variant.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            find_key(root, property, &path, key, places);
            if name == key && !places.contains(&path) {
                places.push(path);
            }
        }
    }
}
