//! What survives a restart: the window of measurements, what is dropped, counters.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use polyhead_evaluation::sensitivity::Rows;

/// The procedure's memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct State {
    /// Measurements so far.
    pub measured: u64,
    /// The last of them, oldest first. Kept in 32 bits: that is what the model computes in.
    pub window: Vec<Rows>,
    /// The last choice by sensitivity, also where something else was dropped.
    pub sensitive: Option<Vec<usize>>,
    /// What was dropped, choice by choice; the last is in force.
    pub dropped: Vec<Vec<usize>>,
    /// EES of every measurement.
    pub ees: Vec<f64>,
    /// Losses of the steps of this interval: their sum and how many.
    loss: (f64, u64),
    /// Whether the run has reached what it was to reach.
    pub finished: bool,
    /// The loss with which it did.
    pub loss_at_end: Option<f64>,
}

/// The same as it is written: numbers as their bits, so that they come back as they were.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    measured: u64,
    /// Base64 of `[texts, d_model]` f32 each.
    window: Vec<String>,
    /// Signs of `d_model` coordinates, 1 where chosen.
    sensitive: Option<String>,
    dropped: Vec<String>,
    ees: Vec<u64>,
    loss: (u64, u64),
    finished: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_at_end: Option<u64>,
    d_model: usize,
}

impl State {
    /// Adds a measurement, of which the last `most` stay.
    pub fn push(&mut self, rows: Rows, most: usize) {
        let rounded = |row: Vec<f64>| row.into_iter().map(|value| f64::from(value as f32)).collect();
        self.window.push(rows.into_iter().map(rounded).collect());
        if self.window.len() > most {
            self.window.remove(0);
        }
        self.measured += 1;
    }

    /// Counts the loss of a step.
    pub fn add_loss(&mut self, loss: f64) {
        self.loss.0 += loss;
        self.loss.1 += 1;
    }

    /// The mean loss of the interval, which ends with it.
    pub fn interval_loss(&mut self) -> f64 {
        let (sum, count) = std::mem::take(&mut self.loss);
        sum / count.max(1) as f64
    }

    /// For the checkpoint.
    pub fn write(&self) -> serde_json::Value {
        let d_model = self.window.first().and_then(|rows| rows.first()).map_or(0, Vec::len);
        let signs = |chosen: &Vec<usize>| (0..d_model).map(|i| if chosen.contains(&i) { '1' } else { '0' }).collect();
        let bytes =
            |rows: &Rows| rows.iter().flatten().flat_map(|&value| (value as f32).to_le_bytes()).collect::<Vec<u8>>();
        let written = Written {
            measured: self.measured,
            window: self.window.iter().map(|rows| STANDARD.encode(bytes(rows))).collect(),
            sensitive: self.sensitive.as_ref().map(signs),
            dropped: self.dropped.iter().map(signs).collect(),
            ees: self.ees.iter().map(|value| value.to_bits()).collect(),
            loss: (self.loss.0.to_bits(), self.loss.1),
            finished: self.finished,
            loss_at_end: self.loss_at_end.map(f64::to_bits),
            d_model,
        };
        serde_json::to_value(written).unwrap_or_default()
    }

    /// From a checkpoint; null before the first. `texts` 0 does not ask how many texts were tracked.
    ///
    /// # Errors
    /// If it is not what [`write`](Self::write) gives for such a model and so many texts.
    pub fn read(value: &serde_json::Value, d_model: usize, texts: usize) -> Result<Self, TrainError> {
        if value.is_null() {
            return Ok(Self::default());
        }
        let unfit = |problem: String| TrainError::Procedure(format!("state of procedure.neuron_dropout: {problem}"));
        let written: Written = serde_json::from_value(value.clone()).map_err(|error| unfit(error.to_string()))?;
        if !written.window.is_empty() && written.d_model != d_model {
            return Err(unfit(format!("it is of a model with d_model {}, not {d_model}", written.d_model)));
        }
        let rows = |text: &String| -> Result<Rows, TrainError> {
            let bytes = STANDARD.decode(text).map_err(|error| unfit(error.to_string()))?;
            let (floats, rest) = bytes.as_chunks::<4>();
            let values: Vec<f64> = floats.iter().map(|&four| f64::from(f32::from_le_bytes(four))).collect();
            let rows: Rows = values.chunks(d_model.max(1)).map(<[f64]>::to_vec).collect();
            let whole = rest.is_empty() && rows.iter().all(|row| row.len() == d_model);
            match whole && (texts == 0 || rows.len() == texts) {
                true => Ok(rows),
                false => Err(unfit(format!("a measurement is not of {texts} texts and {d_model} channels"))),
            }
        };
        let indices = |signs: &String| -> Result<Vec<usize>, TrainError> {
            match signs.len() == d_model {
                true => {
                    Ok(signs.bytes().enumerate().filter(|(_, sign)| *sign == b'1').map(|(index, _)| index).collect())
                }
                false => Err(unfit(format!("a mask has {} signs for {d_model} channels", signs.len()))),
            }
        };
        Ok(Self {
            measured: written.measured,
            window: written.window.iter().map(rows).collect::<Result<_, _>>()?,
            sensitive: written.sensitive.as_ref().map(indices).transpose()?,
            dropped: written.dropped.iter().map(indices).collect::<Result<_, _>>()?,
            ees: written.ees.into_iter().map(f64::from_bits).collect(),
            loss: (f64::from_bits(written.loss.0), written.loss.1),
            finished: written.finished,
            loss_at_end: written.loss_at_end.map(f64::from_bits),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_written_comes_back() {
        let mut state = State::default();
        for step in 0..4 {
            state.push(vec![vec![0.1 * f64::from(step), 1e-9, -3.7], vec![2.0 / 3.0, 0.0, 1e20]], 3);
        }
        state.add_loss(0.1);
        state.add_loss(0.2);
        state.ees = vec![-2.4000000000000004, 1.0 / 3.0];
        state.sensitive = Some(vec![0, 2]);
        state.dropped = vec![vec![1], vec![0, 2]];
        assert_eq!(state.write().get("loss_at_end"), None, "as it was written before there was an end to tell of");
        (state.finished, state.loss_at_end) = (true, Some(0.1 + 0.2));
        let text = serde_json::to_string(&state.write()).unwrap();
        let back = State::read(&serde_json::from_str(&text).unwrap(), 3, 2).unwrap();
        assert_eq!(back, state);
        assert_eq!(State::read(&serde_json::Value::Null, 3, 2).unwrap(), State::default());
        for (d_model, texts) in [(4, 2), (3, 1)] {
            assert!(State::read(&state.write(), d_model, texts).is_err());
        }
        assert!(State::read(&serde_json::json!({ "measured": 1 }), 3, 2).is_err());
    }
}
