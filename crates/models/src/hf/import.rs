//! A folder in Hugging Face's format, read as a [`Decoder`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_attention::Family;
use polyhead_kernels::{multiplies_bf16, without_drawing};
use serde_json::Value;

use super::config::{self, Described, entries};
use super::files;
use super::names::{Layout, is_left_over, place};
use super::peft::Adapter;
use crate::weights::{
    FrozenDtype, MappedTensor, NonFinite, OnProgress, Reading, TensorFiles, WeightsError, check_finite, load_with,
};
use crate::{Decoder, DecoderConfig};

/// Why a folder cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file cannot be read.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// config.json describes something else than what can be read.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What, and what is supported.
        problem: String,
    },
    /// There are no weights that can be read.
    #[error("{}: {problem}", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// What was found, and the way out.
        problem: String,
    },
    /// The weights are broken or do not fit.
    #[error("{}: {cause}", path.display())]
    Weights {
        /// The folder.
        path: PathBuf,
        /// What is wrong with them.
        cause: WeightsError,
    },
}

/// A folder whose config.json has been read and whose weights are mapped, not read.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    described: Described,
    files: TensorFiles,
    /// What is added to the weights, where the folder is an adapter's and `path` its base model's.
    adapter: Option<Adapter>,
}

/// Finds the folder of a model by its name, or says what hinders it.
pub type FindBase<'a> = &'a dyn Fn(&Path) -> Result<Option<PathBuf>, String>;

impl Folder {
    /// Opens a folder with config.json and safetensors files, one or several; or one with an adapter of PEFT, which is folded
    /// into the base model that it names by a path.
    ///
    /// # Errors
    /// If it describes a model that is not supported, or has no weights that can be read.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        Self::open_with(path, &|_| Ok(None))
    }

    /// The same, with what finds the folder of a base model that is named otherwise, such as `org/name` of a hub.
    ///
    /// # Errors
    /// As [`open`](Self::open), and where `find` fails.
    pub fn open_with(path: &Path, find: FindBase<'_>) -> Result<Self, ImportError> {
        // transformers too takes the adapter where a folder has both.
        let config = path.join(files::ADAPTER_CONFIG);
        if !config.is_file() {
            return Self::open_plain(path);
        }
        let (adapter, base) =
            Adapter::open(path, find).map_err(|problem| ImportError::Config { path: config, problem })?;
        let mut folder = Self::open_plain(&base)?;
        folder.described.notes.push(adapter.note(&base));
        folder.adapter = Some(adapter);
        Ok(folder)
    }

    /// Opens a folder without its adapter.
    fn open_plain(path: &Path) -> Result<Self, ImportError> {
        let config = path.join(files::CONFIG);
        let text =
            std::fs::read_to_string(&config).map_err(|cause| ImportError::File { path: config.clone(), cause })?;
        let mut described = config::read(&text).map_err(|problem| ImportError::Config { path: config, problem })?;
        if let Some(ends) = ends_of_generation(path, described.vocab_size)? {
            described.ends = ends;
        }
        let unfit = |cause| ImportError::Weights { path: path.to_owned(), cause };
        let files = TensorFiles::open(&shards(path)?).map_err(unfit)?;
        let mut folder = Self { path: path.to_owned(), described, files, adapter: None };
        folder.untie().map_err(unfit)?;
        Ok(folder)
    }

    /// Gives a model that is tied by its config.json the head that its files have, where that is another one than the
    /// embedding: so does transformers 5 (4 ties, and the head is lost).
    fn untie(&mut self) -> Result<(), WeightsError> {
        let [embedding, head] = ["embedding.weight", "head.weight"].map(|ours| place(self.family(), ours).name);
        if !self.described.decoder.tie_embeddings || self.files.shape(&head).is_none() {
            return Ok(());
        }
        if !self.files.equal([&head, &embedding])? {
            self.described.decoder.tie_embeddings = false;
            self.described.notes.push(format!(
                "tie_word_embeddings is true in config.json, but {head} differs from {embedding}: the model is taken with \
                 the head that the file has, as transformers 5 takes it"
            ));
        }
        Ok(())
    }

    /// The folder of the weights: of an adapter, the base model's.
    pub fn base(&self) -> &Path {
        &self.path
    }

    /// The files that its weights are in: those of an adapter last.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        let files: BTreeSet<&Path> = self.files.names().filter_map(|name| self.files.file(name)).collect();
        files.into_iter().map(Path::to_owned).chain(self.adapter.iter().map(Adapter::file)).collect()
    }

    /// Whether an adapter is folded into its weights.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// What a person should know about how the folder is read, as sentences.
    pub fn notes(&self) -> &[String] {
        &self.described.notes
    }

    /// What the model is.
    pub fn decoder(&self) -> &DecoderConfig {
        &self.described.decoder
    }

    /// What kind of model it is.
    pub fn family(&self) -> &'static Family {
        self.described.family
    }

    /// Ids that the model knows.
    pub fn vocab_size(&self) -> usize {
        self.described.vocab_size
    }

    /// Tokens after which the model has said what it has to say: those of generation_config.json, else of config.json.
    pub fn ends(&self) -> &[u32] {
        &self.described.ends
    }

    /// The longest sequence that the model is made for.
    pub fn max_positions(&self) -> usize {
        self.described.max_positions
    }

    /// The model, its weights in f32. They are read parameter by parameter, so that no second copy is ever held.
    ///
    /// # Errors
    /// Lists every missing, left-over and misshapen tensor, and every one that holds a number that is not finite.
    pub fn load(&self, device: &Device) -> Result<Decoder, ImportError> {
        self.load_with(device, NonFinite::Refuse, &mut |_, _| {})
    }

    /// The same, with what to do about numbers that are not finite, the type in which weights are kept (bf16 as in the file on the
    /// CPU alone, where products take it), and what is told how far it is.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(
        &self,
        device: &Device,
        reading: impl Into<Reading>,
        progress: OnProgress<'_>,
    ) -> Result<Decoder, ImportError> {
        let Reading { nonfinite, frozen } = reading.into();
        let frozen = if frozen == FrozenDtype::File && !multiplies_bf16(device) { FrozenDtype::F32 } else { frozen };
        let config = self.decoder();
        // Told before anything of that size is made.
        let held = self.files.numbers();
        let described = config.costs(self.vocab_size()).parameters;
        if described > 2 * held.max(1) {
            let problem = format!("config.json describes {described} numbers, and the files hold {held}");
            return Err(ImportError::Weights { path: self.path.clone(), cause: WeightsError::Unfit(vec![problem]) });
        }
        let (mut used, mut bad, mut read) = (BTreeSet::new(), BTreeSet::new(), 0);
        let mut added = BTreeSet::new();
        let model = without_drawing(|| config.init(self.vocab_size(), device));
        let (model, mut problems) = load_with(model, &mut |ours, shape| {
            let place = place(self.family(), ours);
            used.insert(place.name.clone());
            progress(read, described);
            read += shape.iter().product::<usize>() as u64;
            let their_shape = match (place.layout, shape) {
                (Layout::Transposed, &[rows, columns]) => vec![columns, rows],
                (Layout::Third(_), &[rows, columns]) => vec![3 * columns, rows],
                (Layout::Third(_), &[channels]) => vec![3 * channels],
                _ => shape.to_vec(),
            };
            match self.files.shape(&place.name) {
                None => return Err(format!("{} is missing", place.name)),
                Some(found) if found != their_shape => {
                    return Err(format!("{} has shape {found:?}, expected {their_shape:?}", place.name));
                }
                Some(_) => {}
            }
            let mut values = self.files.values(&place.name).map_err(WeightsError::told)?;
            let mut in_file = self.files.tensor(&place.name).map(MappedTensor::dtype);
            if let Some(adapter) = &self.adapter {
                let more = adapter.add(&place.name, &their_shape, &mut values)?;
                in_file = in_file.filter(|_| more.is_empty());
                added.extend(more);
            }
            if let (NonFinite::Refuse, Err(problem)) = (nonfinite, check_finite(&place.name, &their_shape, &values)) {
                let file = self.files.file(&place.name).and_then(Path::file_name).unwrap_or_default();
                bad.insert(format!("{}: {problem}", file.display()));
            }
            let rows = their_shape[0];
            let values = match place.layout {
                Layout::Same => values,
                Layout::Transposed => transpose(&values, rows),
                Layout::Third(part) => {
                    let third = third(&values, rows / (3 * config.head_dim(0)), part);
                    if shape.len() == 2 { transpose(&third, rows / 3) } else { third }
                }
            };
            Ok(Some(frozen.keep(ours, in_file, values, shape)))
        });
        progress(described, described);
        // Three of our parameters may be in one of theirs.
        let mut told = BTreeSet::new();
        problems.retain(|problem| told.insert(problem.clone()));
        let unknown = self.files.names().filter(|name| !used.contains(*name) && !is_left_over(name, config));
        let unknown = unknown.chain(self.adapter.iter().flat_map(|adapter| adapter.unused(&added)));
        problems.extend(unknown.map(|name| format!("{name} belongs to no parameter")));
        let unfit = |cause| Err(ImportError::Weights { path: self.path.clone(), cause });
        match (problems.is_empty(), bad.is_empty()) {
            (true, true) => Ok(model),
            (false, _) => unfit(WeightsError::Unfit(problems)),
            (true, false) => unfit(WeightsError::NonFinite(bad.into_iter().collect())),
        }
    }
}

/// The tokens that end a text by generation_config.json, if it names any.
///
/// # Errors
/// If it names special tokens that the model does not know.
fn ends_of_generation(folder: &Path, vocab_size: usize) -> Result<Option<Vec<u32>>, ImportError> {
    let path = folder.join(files::GENERATION_CONFIG);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(|cause| ImportError::File { path: path.clone(), cause })?;
    let checked = entries::read(&text).and_then(|keys| config::special_ids(&keys, vocab_size as u64));
    let ends = checked.map_err(|problem| ImportError::Config { path, problem })?;
    Ok((!ends.is_empty()).then_some(ends))
}

/// The file of weights that a folder lacks, where it lacks one.
///
/// # Errors
/// If its index cannot be read, as a sentence.
pub fn missing_weights(folder: &Path) -> Result<Option<String>, String> {
    let is_there = |name: &str| folder.join(name).is_file();
    let needed = match is_there(files::ADAPTER_CONFIG) {
        true => vec![files::ADAPTER_WEIGHTS.to_owned()],
        false if is_there(files::WEIGHTS) || !is_there(files::WEIGHTS_INDEX) => vec![files::WEIGHTS.to_owned()],
        false => {
            let index = folder.join(files::WEIGHTS_INDEX);
            let text = std::fs::read_to_string(&index).map_err(|error| error.to_string());
            text.and_then(|text| files_of_index(&text)).map_err(|problem| format!("{}: {problem}", index.display()))?
        }
    };
    Ok(needed.into_iter().find(|name| !is_there(name)))
}

/// The files that a model.safetensors.index.json names, sorted, each once; all lie beside it.
///
/// # Errors
/// What is wrong with it, as a sentence.
pub fn files_of_index(text: &str) -> Result<Vec<String>, String> {
    let table: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let map = table["weight_map"].as_object().filter(|map| !map.is_empty());
    let map = map.ok_or("weight_map must give a file of this folder for every tensor")?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|name| !name.contains(['/', '\\']) && !["", ".", ".."].contains(name));
        let rule = || format!("weight_map.{tensor} ({file}) must be the name of a file of this folder, without a path");
        names.insert(name.ok_or_else(rule)?.to_owned());
    }
    Ok(names.into_iter().collect())
}

/// The safetensors files of a folder.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let (single, index) = (folder.join(files::WEIGHTS), folder.join(files::WEIGHTS_INDEX));
    let no_weights = |problem: String| ImportError::NoWeights { path: folder.to_owned(), problem };
    if single.is_file() {
        return Ok(vec![single]);
    }
    if index.is_file() {
        let text = std::fs::read_to_string(&index).map_err(|cause| ImportError::File { path: index.clone(), cause })?;
        let refused = |problem| ImportError::Config { path: index.clone(), problem };
        let names = files_of_index(&text).map_err(refused)?;
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let entries = std::fs::read_dir(folder).map_err(|cause| ImportError::File { path: folder.to_owned(), cause })?;
    let pickled = |name: &str| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending));
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    match names.iter().find(|name| pickled(name)) {
        Some(name) => Err(no_weights(format!(
            "{name} is a pickle, which can run any program when it is read; only safetensors files are (docs: From and to Hugging Face). \
             Convert it once where you trust it: python -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('{0}').save_pretrained('{0}-safetensors')\"",
            folder.display()
        ))),
        None => Err(no_weights("neither model.safetensors nor model.safetensors.index.json is there".into())),
    }
}

/// `[rows, columns]` to `[columns, rows]`, in squares that fit the cache.
pub(super) fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    const SIDE: usize = 32;
    let columns = values.len() / rows.max(1);
    let mut out = vec![0.0; values.len()];
    for (left, band) in (0..columns).step_by(SIDE).zip(out.chunks_mut((SIDE * rows).max(1))) {
        for top in (0..rows).step_by(SIDE) {
            for (column, out) in (left..).zip(band.chunks_mut(rows)) {
                let out = &mut out[top..rows.min(top + SIDE)];
                let column = values[top * columns + column..].iter().step_by(columns);
                out.iter_mut().zip(column).for_each(|(out, value)| *out = *value);
            }
        }
    }
    out
}

/// One third of rows with the layout `[n_heads, 3, head_dim]`.
fn third(values: &[f32], n_heads: usize, part: usize) -> Vec<f32> {
    let per_head = values.len() / n_heads;
    let length = per_head / 3;
    values.chunks(per_head).flat_map(|head| &head[part * length..][..length]).copied().collect()
}
