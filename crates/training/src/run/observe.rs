//! What is looked at while training: attention on one row of a batch, and the spread of the weights.

use std::collections::BTreeSet;

use burn::tensor::Tensor;
use polyhead_attention::Observe;
use polyhead_models::{ImageRows, Trainable, parameters, weights};
use serde_json::json;

use super::Record;
use crate::image::{Sheet, attention_grid, head_gates, sheet};

/// What is to be looked at after a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    /// Numbers of the mechanism, and histograms of the weights.
    pub numbers: bool,
    /// Attention maps, which only TensorBoard shows.
    pub maps: bool,
}

/// Looks at `model` on the first row of `batch`. Numbers go to both logs, as their mean over heads; how they are spread
/// over heads, the maps and the histograms go to TensorBoard.
pub(crate) fn write<M: Trainable>(look: Look, record: &mut Record, (model, batch): (&M, &M::Batch), step: u64) {
    let frozen: BTreeSet<String> =
        parameters(model).into_iter().filter(|one| !one.trainable).map(|one| one.name).collect();
    let model = model.valid();
    let observe = if look.maps { Observe::Maps } else { Observe::Numbers };
    let values = |x: Tensor<1>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    let mut line = json!({ "step": step });
    for (layer, seen) in model.observe_layers(batch, observe).into_iter().enumerate() {
        let tag = format!("attention/layer_{layer:02}");
        let shown = format!("model/{tag}");
        for (row, numbers) in seen.numbers.into_iter().filter(|_| look.numbers) {
            let (name, numbers) = (row.name, values(numbers));
            let mean = numbers.iter().sum::<f32>() / numbers.len().max(1) as f32;
            line[format!("{tag}/{name}")] = json!(mean);
            record.write_events(|events| {
                events.described_scalar(&format!("{shown}/{name}"), step, mean, &row.to_string())?;
                if numbers.len() > 1 {
                    events.histogram(&format!("{shown}/{name}_per_head"), step, &numbers)?;
                }
                Ok(())
            });
        }
        if let Some(maps) = seen.maps {
            record.write_events(|events| {
                let [_, queries, keys] = maps.dims();
                let maps: Vec<Vec<f32>> =
                    values(maps.flatten(0, 2)).chunks(queries * keys).map(<[f32]>::to_vec).collect();
                let png = attention_grid(&maps, queries, keys)?;
                Ok(events.image_png(&format!("{shown}/maps"), step, png.width, png.height, &png.bytes)?)
            });
        }
        if let Some(gates) = seen.gates {
            record.write_events(|events| {
                let [heads, tokens] = gates.dims();
                let png = head_gates(&values(gates.flatten(0, 1)), heads, tokens)?;
                Ok(events.image_png(&format!("{shown}/gates"), step, png.width, png.height, &png.bytes)?)
            });
        }
    }
    if let Some(rows) = look.maps.then(|| model.images(batch)).flatten() {
        record.write_events(|events| {
            let ImageRows { images, height, width, across } = rows;
            let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
            let png = sheet(&images, Sheet { channels: 3, height, width, across })?;
            Ok(events.image_png("validation/images", step, png.width, png.height, &png.bytes)?)
        });
    }
    if !look.numbers {
        return;
    }
    record.line(&line);
    // One at a time: no copy of the whole model. What is frozen has the same histogram at every step.
    record.write_events(|events| {
        for parameter in weights::held(&model).into_iter().filter(|parameter| !frozen.contains(&parameter.name)) {
            events.histogram(&format!("weights/{}", parameter.name), step, &parameter.values())?;
        }
        Ok(())
    });
}
