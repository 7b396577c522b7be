//! `polyhead upscale`: an image of more pixels, by a network that was trained for it.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use clap::Args;
use polyhead_attention::Observe;
use polyhead_data::read_image;
use polyhead_models::Trainable;
use polyhead_models::super_resolution::{COLOURS, Phase};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::super_resolution::open_super_resolution;
use polyhead_training::image::coloured;
use polyhead_training::run_folder::atomic_write;

use super::new_folder::sweep;
use super::{check_memory, must_not_exist};
use crate::allowed::caller;
use crate::console::talk;

/// What is enlarged by what.
#[derive(Debug, Args)]
pub struct UpscaleArgs {
    /// The image: PNG, JPEG, WebP, GIF, TIFF or BMP; what is transparent is laid on black.
    pub image: PathBuf,
    /// A run of model.super_resolution, or a checkpoint of one, which says how many times larger the image becomes.
    #[arg(long)]
    pub model: PathBuf,
    /// The PNG file to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Enlarges an image.
pub fn upscale(args: &UpscaleArgs) -> Result<(), Failure> {
    must_not_exist(&args.out)?;
    if !args.out.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png")) {
        let problem = format!("--out {}: a PNG file is written, so let its name end in .png", args.out.display());
        return Err(Problems::plain(problem).into());
    }
    let image = read_image(&args.image)?;
    let Some(trained) = open_super_resolution(&args.model, args.device.as_deref(), caller())? else {
        let problem = format!("{}: a run of model.super_resolution is needed", args.model.display());
        return Err(Problems::plain(problem).into());
    };
    let (config, size) = (trained.model.config(), [image.height, image.width]);
    config.check_image(size).map_err(|problem| Failure::Run(format!("{}: {problem}", args.image.display())))?;
    let device = args.device.as_deref().unwrap_or(&trained.recipe.training.device);
    let what = format!("enlarging {} x {} pixels", image.width, image.height);
    check_memory(device, 4 * config.working_numbers(size), &what, "enlarge a part of the image")?;
    let shape = [1, COLOURS, image.height, image.width];
    let low = Tensor::from_data(TensorData::new(image.planes(), shape), &trained.model.device());
    let high = trained.model.forward(low, Phase::Evaluation, &Observe::Nothing).image;
    let [_, _, height, width] = high.dims();
    let png = coloured(&high.into_data().iter::<f32>().collect::<Vec<f32>>(), [height, width]);
    sweep(args.out.parent().unwrap_or(std::path::Path::new("")))?;
    atomic_write(&args.out, &png.map_err(|error| Failure::Run(error.to_string()))?.bytes)?;
    talk!("wrote {width} x {height} pixels to {} (from {} x {})", args.out.display(), image.width, image.height);
    Ok(())
}
