//! What is looked at with each validation: attention on one row of text, and the spread of the weights.

use burn::module::Module;
use burn::tensor::Tensor;
use polyhead_attention::{Mask, Observe};
use polyhead_models::{Batch, Decoder, weights};

use crate::TrainError;
use crate::picture::attention_grid;
use crate::tensorboard::EventWriter;

/// Writes numbers, maps and histograms of `model` on the first row of `batch`.
pub(crate) fn write(events: &mut EventWriter, model: &Decoder, batch: &Batch, step: u64) -> Result<(), TrainError> {
    let model = model.valid();
    let row = batch.row(0);
    let forward = model.forward(model.tokens(&row), &Mask::causal(), None, Observe::Maps);
    let values = |x: Tensor<1>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    for (layer, seen) in forward.seen.into_iter().enumerate() {
        let tag = format!("attention/layer_{layer:02}");
        for (name, numbers) in seen.numbers {
            let numbers = values(numbers);
            let mean = numbers.iter().sum::<f32>() / numbers.len().max(1) as f32;
            events.scalar(&format!("{tag}/{name}"), step, mean)?;
            if numbers.len() > 1 {
                events.histogram(&format!("{tag}/{name}_per_head"), step, &numbers)?;
            }
        }
        if let Some(maps) = seen.maps {
            let [heads, queries, keys] = maps.dims();
            let all = maps.into_data().iter::<f32>().collect::<Vec<f32>>();
            let maps: Vec<Vec<f32>> = all.chunks(queries * keys).map(<[f32]>::to_vec).collect();
            debug_assert_eq!(maps.len(), heads);
            let png = attention_grid(&maps, queries, keys)?;
            events.image_png(&format!("{tag}/maps"), step, png.width, png.height, &png.bytes)?;
        }
    }
    for parameter in weights::named(&model) {
        events.histogram(&format!("weights/{}", parameter.name), step, &parameter.values)?;
    }
    Ok(())
}
