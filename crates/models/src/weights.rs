//! Parameters by name, to and from safetensors. The only place that writes the names of a checkpoint's tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use safetensors::tensor::{Dtype, TensorInfo, TensorView};

mod files;
mod finite;
mod frozen;
mod header;
mod stream;
mod walk;

pub use files::{MappedTensor, TensorFiles};
pub use finite::{NonFinite, check_finite};
pub use frozen::{FrozenDtype, Reading};
pub use stream::{Held, ToWrite, held, write_safetensors};
pub use walk::{ParameterMapper, ParameterVisitor, map_parameters, visit_parameters};

/// Weights that do not fit the model.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Not a safetensors file, or a broken one.
    #[error("not a readable safetensors file: {0}")]
    Unreadable(String),
    /// Tensors that cannot be written, which would be our mistake.
    #[error("the tensors cannot be written: {0}")]
    Unwritable(#[from] safetensors::SafeTensorError),
    /// A file that cannot be read.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file that is no safetensors file, or a broken one.
    #[error("{}: not a readable safetensors file: {cause}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// A name that two files of one model have.
    #[error("{name} is in two files, {} and {}: each tensor may be in one", files[0].display(), files[1].display())]
    Twice {
        /// The tensor.
        name: String,
        /// Both files.
        files: [PathBuf; 2],
    },
    /// All disagreements at once.
    #[error("the weights do not fit the model: {}", listed(.0))]
    Unfit(Vec<String>),
    /// Numbers that no model computes with.
    #[error("{}\n  hint: such a model computes nothing but NaN; --allow-nonfinite takes it all the same", listed(.0))]
    NonFinite(Vec<String>),
}

impl WeightsError {
    /// What is wrong with a tensor, for a list of problems.
    pub(crate) fn told(self) -> String {
        match self {
            Self::Unfit(problems) => problems.join("; "),
            other => other.to_string(),
        }
    }
}

/// Problems in one line; of very many the first ones and their number.
fn listed(problems: &[String]) -> String {
    /// A layer has a dozen tensors: several layers are told in full. Chosen by us.
    const MOST: usize = 100;
    let first = problems[..problems.len().min(MOST)].join("; ");
    match problems.len() {
        count if count > MOST => format!("{first}; and {} more", count - MOST),
        _ => first,
    }
}

/// A named f32 tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Field names from the model down, joined by dots.
    pub name: String,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f32>,
}

/// The layer that a parameter of this name belongs to, from 0; `None` for those of no layer.
pub fn layer_of(name: &str) -> Option<usize> {
    let inside = name.strip_prefix("body.").unwrap_or(name); // of a classifier
    inside.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// All parameters of a module, in the order of its fields.
pub fn named<M: Module>(module: &M) -> Vec<Named> {
    held(module).iter().map(Held::named).collect()
}

/// The bytes of a safetensors file with these tensors.
///
/// # Errors
/// If a shape does not hold its values, which would be our mistake.
pub fn to_safetensors(tensors: &[Named], metadata: &[(&str, String)]) -> Result<Vec<u8>, WeightsError> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(tensor, bytes)| Ok((tensor.name.as_str(), TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?)));
    let views: Vec<(&str, TensorView<'_>)> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    Ok(safetensors::serialize(views, Some(metadata))?)
}

/// Reads all tensors of a safetensors file; they must be f32.
///
/// # Errors
/// If the file is broken or holds another type.
pub fn from_safetensors(bytes: &[u8]) -> Result<BTreeMap<String, Named>, WeightsError> {
    let header = header::read(bytes).map_err(WeightsError::Unreadable)?;
    let read = |(name, info): (String, TensorInfo)| {
        if info.dtype != Dtype::F32 {
            return Err(WeightsError::Unfit(vec![format!("{name} is {:?}, expected F32", info.dtype)]));
        }
        let (from, to) = info.data_offsets;
        let (chunks, _) = bytes[header.start + from..header.start + to].as_chunks::<4>();
        let values = chunks.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect();
        Ok((name.clone(), Named { name, shape: info.shape, values }))
    };
    header.tensors.into_iter().map(read).collect()
}

/// The module with its parameters replaced by the tensors of the same names.
///
/// # Errors
/// Lists every missing, left-over and misshapen tensor.
pub fn load<M: Module>(module: M, mut tensors: BTreeMap<String, Named>) -> Result<M, WeightsError> {
    let (module, mut problems) = load_with(module, &mut |name, expected| {
        let Some(tensor) = tensors.remove(name) else { return Err(format!("{name} is missing")) };
        match tensor.shape == expected {
            true => Ok(Some(TensorData::new(tensor.values, tensor.shape))),
            false => Err(format!("{name} has shape {:?}, expected {expected:?}", tensor.shape)),
        }
    });
    problems.extend(tensors.into_keys().map(|name| format!("{name} belongs to no parameter")));
    if problems.is_empty() { Ok(module) } else { Err(WeightsError::Unfit(problems)) }
}

/// The same from files, tensor by tensor: no second copy is ever held. The parameters that are not `part` of what the files
/// have stay as they are; values of the others are not looked at.
///
/// # Errors
/// Lists every missing, left-over and misshapen tensor; or, unless they are allowed, those with numbers that are not finite.
pub fn load_files<M: Module>(
    module: M,
    files: &TensorFiles,
    part: fn(&str) -> bool,
    reading: impl Into<Reading>,
    progress: OnProgress<'_>,
) -> Result<M, WeightsError> {
    let Reading { nonfinite, frozen } = reading.into();
    let (mut used, mut bad) = (BTreeSet::new(), Vec::new());
    let (mut read, all) = (0, files.numbers());
    let (module, mut problems) = load_with(module, &mut |name, expected| {
        if !part(name) {
            return Ok(None);
        }
        used.insert(name.to_owned());
        progress(read, all);
        read += expected.iter().product::<usize>() as u64;
        match files.shape(name) {
            None => return Err(format!("{name} is missing")),
            Some(shape) if shape != expected => {
                return Err(format!("{name} has shape {shape:?}, expected {expected:?}"));
            }
            Some(_) => {}
        }
        let values = files.values(name).map_err(WeightsError::told)?;
        if nonfinite == NonFinite::Refuse {
            bad.extend(check_finite(name, expected, &values).err());
        }
        let in_file = files.tensor(name).map(MappedTensor::dtype);
        Ok(Some(frozen.keep(name, in_file, values, expected)))
    });
    progress(all, all);
    problems.extend(
        files.names().filter(|name| !used.contains(*name)).map(|name| format!("{name} belongs to no parameter")),
    );
    match (bad.is_empty(), problems.is_empty()) {
        (true, true) => Ok(module),
        (false, _) => Err(WeightsError::NonFinite(bad)),
        (true, false) => Err(WeightsError::Unfit(problems)),
    }
}

/// The module with its parameters replaced by tensors of the same names that are on its device already: they are shared, not
/// copied.
///
/// # Errors
/// Lists every missing, left-over and misshapen tensor.
pub fn load_held<M: Module>(module: M, tensors: BTreeMap<String, Held>) -> Result<M, WeightsError> {
    struct Put(BTreeMap<String, Held>, Vec<String>);
    impl ParameterMapper for Put {
        fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let expected = param.dims();
            match self.0.remove(&name) {
                None => self.1.push(format!("{name} is missing")),
                Some(held) if held.shape != expected => {
                    self.1.push(format!("{name} has shape {:?}, expected {expected:?}", held.shape));
                }
                Some(held) => {
                    return param.map(|old| {
                        let new = held.tensor().detach();
                        if old.is_require_grad() { new.require_grad() } else { new }
                    });
                }
            }
            param
        }
    }
    let (module, Put(tensors, mut problems)) = map_parameters(module, Put(tensors, Vec::new()));
    problems.extend(tensors.into_keys().map(|name| format!("{name} belongs to no parameter")));
    if problems.is_empty() { Ok(module) } else { Err(WeightsError::Unfit(problems)) }
}

/// Takes how much of a long work is done, and how much there is.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// Gives the values of the parameter of a name and a shape, in the type in which they are kept, `None` where it stays as it is,
/// or says why it cannot.
pub type Values<'a> = dyn FnMut(&str, &[usize]) -> Result<Option<TensorData>, String> + 'a;

/// The module with every parameter replaced by the values that `values` gives for its name and shape, and what `values`
/// said where it could not.
pub fn load_with<M: Module>(module: M, values: &mut Values<'_>) -> (M, Vec<String>) {
    struct Put<'a, 'b>(&'a mut Values<'b>, Vec<String>);
    impl ParameterMapper for Put<'_, '_> {
        fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let shape = param.dims().to_vec();
            match (self.0)(&name, &shape) {
                Err(problem) => {
                    self.1.push(problem);
                    param
                }
                Ok(None) => param,
                Ok(Some(values)) => param.map(|old| {
                    let dtype = values.dtype();
                    let new = Tensor::from_data(values, (&old.device(), dtype));
                    if old.is_require_grad() { new.require_grad() } else { new }
                }),
            }
        }
    }
    let (module, Put(_, problems)) = map_parameters(module, Put(values, Vec::new()));
    (module, problems)
}
