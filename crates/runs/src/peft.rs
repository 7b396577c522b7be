//! What LoRA learned, as an adapter of PEFT.

use polyhead_models::hf;
use polyhead_recipe::Problems;

use crate::Caller;
use crate::base::Base;
use crate::device;
use crate::error::Failure;
use crate::pretrained::Pretrained;

/// The low-rank pairs of a run as files.
///
/// # Errors
/// If there are none, or the base model is not in Hugging Face's format.
pub fn adapter_files(run: &Pretrained, caller: Caller) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let refused = |problem: &str, hint: &str| -> Failure {
        Problems::plain(format!("--adapter: {} {problem}\n  hint: {hint}", run.path.display())).into()
    };
    let merged = "leave --adapter out: the merged model is written";
    let Some(lora) = run.recipe.as_ref().and_then(|recipe| recipe.lora.as_ref()) else {
        return Err(refused("was not trained with [lora]", merged));
    };
    let (Some(base), Some(record)) = (&run.base, Base::read(&run.path)?) else {
        return Err(refused("has all weights, and no base model that it would go with", merged));
    };
    let Some(folder) = base.foreign.as_ref().filter(|folder| !folder.is_adapted()) else {
        let problem = format!("was trained from {}, which PEFT cannot read", base.path.display());
        let hint = "export the base model, and name that folder in model.pretrained; or leave --adapter out";
        return Err(refused(&problem, hint));
    };
    let model = run.with_pairs(&device::open("flex").map_err(Failure::Run)?, caller)?;
    let files = hf::export_adapter(&model, lora, folder.family(), &record.name());
    files.map_err(|error| Failure::Run(error.to_string()))
}
