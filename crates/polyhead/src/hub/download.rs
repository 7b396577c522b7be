//! Fetches a model of the Hugging Face hub into the cache, with the crate of Hugging Face.

use std::io::Read;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress as Follow;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use polyhead_models::hf::files::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, WEIGHTS_INDEX,
};
use polyhead_runs::Failure;
use polyhead_runs::hub::Reference;
use sha2::{Digest, Sha256};

use crate::console::{bytes, progress, talk};

/// Times that a download is begun again where a connection breaks; chosen by us.
const RETRIES: usize = 5;

/// The files beside settings and weights, where the repository has them.
const BESIDES: [&str; 5] =
    [GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja"];

/// Fetches what is missing of a model; gives its folder. What is there is not fetched again, and what was begun goes on.
///
/// # Errors
/// If the hub cannot be reached, does not have it, or sends something else than it says.
pub fn fetch(reference: &Reference, cache: &Path) -> Result<PathBuf, Failure> {
    let failed = |error: ApiError| Failure::Run(format!("{reference}: cannot be fetched: {}", in_words(&error)));
    let api = ApiBuilder::from_env().with_cache_dir(cache.to_owned()).with_progress(false).with_retries(RETRIES);
    let api = api.with_token(token(cache)).build().map_err(failed)?;
    let named = Repo::with_revision(reference.name.clone(), RepoType::Model, reference.revision.clone());
    let repo = api.repo(named);
    let listed: Vec<String> = repo.info().map_err(failed)?.siblings.into_iter().map(|file| file.rfilename).collect();
    let has = |name: &str| listed.iter().any(|file| file == name);
    let get = |name: &str| {
        // What the hub says goes into paths of the cache.
        let told = api.metadata(&repo.url(name)).map_err(failed)?;
        let plain =
            |text: &str| !text.is_empty() && text.chars().all(|sign| sign.is_ascii_alphanumeric() || sign == '-');
        match plain(told.etag()) && plain(told.commit_hash()) {
            true => one(&repo, name, told.size() as u64, told.etag())
                .map_err(|problem| Failure::Run(format!("{reference}: {name}: {problem}"))),
            false => Err(Failure::Run(format!("{reference}: {name}: the hub names it by something that is no hash"))),
        }
    };
    talk!("fetching {reference} into {}", cache.display());
    for name in BESIDES.into_iter().filter(|name| has(name)) {
        get(name)?;
    }
    let (settings, weights) = match has(ADAPTER_CONFIG) {
        true => (ADAPTER_CONFIG, vec![ADAPTER_WEIGHTS.to_owned()]),
        false if has(WEIGHTS) => (CONFIG, vec![WEIGHTS.to_owned()]),
        false if has(WEIGHTS_INDEX) => {
            let index = get(WEIGHTS_INDEX)?;
            let text = std::fs::read_to_string(&index).map_err(|error| Failure::file("read", &index, error))?;
            let names = polyhead_models::hf::files_of_index(&text);
            (CONFIG, names.map_err(|problem| Failure::Run(format!("{}: {problem}", index.display())))?)
        }
        false => {
            let problem = format!("has no {WEIGHTS}, and other formats can run programs when they are read");
            return Err(Failure::Run(format!("{reference} {problem}")));
        }
    };
    get(settings)?;
    for name in weights {
        get(&name)?;
    }
    let changed = || Failure::Run(format!("{reference} has changed on the hub while it was fetched: try again"));
    reference.cached(cache)?.ok_or_else(changed)
}

/// Fetches one file, unless it is there; checks its size, and its SHA-256 where that is its name.
fn one(repo: &ApiRepo, name: &str, size: u64, etag: &str) -> Result<PathBuf, String> {
    let path = repo.download_with_progress(name, Followed::default()).map_err(|error| in_words(&error))?;
    let found = std::fs::metadata(&path).map_err(|error| error.to_string())?.len();
    let hashed = etag.len() == 64 && etag.chars().all(|sign| sign.is_ascii_hexdigit());
    let whole = found == size && (!hashed || sha256(&path).map_err(|error| error.to_string())? == etag.to_lowercase());
    if whole {
        talk!("{name}: {}", bytes(size));
        return Ok(path);
    }
    // A link and what it leads to: neither is what the hub has.
    for file in [path.canonicalize().ok(), Some(path)].into_iter().flatten() {
        let _ = std::fs::remove_file(file);
    }
    Err("what was received is not what the hub has, and was removed: try again".into())
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hash, mut piece) = (std::fs::File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => hash.update(&piece[..read]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What went wrong, and what a person can do about it. Nothing of what was sent is told: it may hold a token.
fn in_words(error: &ApiError) -> String {
    let told = error.to_string();
    let hint = match () {
        () if told.contains("401") || told.contains("403") => {
            "it does not exist, or needs a token (HF_TOKEN, or `hf auth login`) whose owner was given access"
        }
        () if told.contains("404") => "there is no such model, revision or file",
        () if told.contains("Lock") => "another process fetches it: wait for that one",
        () => "is the network there? HF_ENDPOINT names another server than https://huggingface.co",
    };
    format!("{told}\n  hint: {hint}")
}

/// The token of a person, from where Hugging Face's tools keep it. It is never printed.
fn token(cache: &Path) -> Option<String> {
    let set =
        |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| cache.parent().map(Path::to_owned));
        home.map(|home| home.join("token"))
    });
    let kept =
        || std::fs::read_to_string(file?).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    set("HF_TOKEN").or_else(kept)
}

/// Shows how far a file is.
#[derive(Default)]
struct Followed {
    done: u64,
    size: u64,
}

impl Follow for Followed {
    fn init(&mut self, size: usize, _name: &str) {
        (self.done, self.size) = (0, size as u64);
    }

    fn update(&mut self, received: usize) {
        self.done += received as u64;
        progress("fetching", self.done, self.size);
    }

    fn finish(&mut self) {}
}
