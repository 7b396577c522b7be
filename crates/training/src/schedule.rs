//! The learning rate as a pure function of the step.

use crate::config::{Decay, LrSchedulerConfig};

/// The share of the largest learning rate that step `step` (from 0) of `steps` trains with.
pub fn factor(config: &LrSchedulerConfig, step: u64, steps: u64) -> f64 {
    let (step, steps, warmup) = (step as f64, steps as f64, config.warmup_steps as f64);
    if step < warmup {
        return (step + 1.0) / warmup;
    }
    let floor = config.min_lr_ratio;
    // Held rates: the last one would be reached one hold behind the last step.
    let hold = config.hold_steps as f64;
    let between = |start: f64| match config.hold_steps {
        0 | 1 => ((step - start) / (steps - 1.0 - start).max(1.0)).clamp(0.0, 1.0),
        _ => (((step - start) / hold).floor() * hold / (steps - start).max(1.0)).clamp(0.0, 1.0),
    };
    match config.decay {
        Decay::Constant => 1.0,
        Decay::Linear => 1.0 - (1.0 - floor) * between(warmup),
        Decay::Cosine => floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * between(warmup)).cos()),
        Decay::Wsd => {
            let length = config.decay_steps.map_or(steps / 5.0, |steps| steps as f64);
            1.0 - (1.0 - floor) * between((steps - length).max(warmup))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(decay: Decay, step: u64) -> f64 {
        let config =
            LrSchedulerConfig { decay, warmup_steps: 10, min_lr_ratio: 0.1, hold_steps: 1, decay_steps: Some(20) };
        factor(&config, step, 110)
    }

    #[test]
    fn every_shape_warms_up_and_ends_at_its_floor() {
        for decay in [Decay::Linear, Decay::Cosine, Decay::Wsd] {
            assert!((at(decay, 0) - 0.1).abs() < 1e-12 && (at(decay, 9) - 1.0).abs() < 1e-12);
            assert!((at(decay, 109) - 0.1).abs() < 1e-12, "{decay:?} ends at {}", at(decay, 109));
            assert!((10..109).all(|step| at(decay, step) >= at(decay, step + 1)), "{decay:?} falls");
        }
        assert_eq!(at(Decay::Constant, 109), 1.0);
        assert_eq!(at(Decay::Wsd, 89), 1.0);
        assert!(at(Decay::Wsd, 92) < 1.0);
    }

    #[test]
    fn rates_held_for_an_epoch_are_those_of_pytorch() {
        // CosineAnnealingLR(T_max = 4, eta_min = 0), stepped once per epoch of 5 steps.
        let config = LrSchedulerConfig { min_lr_ratio: 0.0, hold_steps: 5, ..LrSchedulerConfig::default() };
        let of_epoch = [1.0, 0.853_553_390_593_273_8, 0.5, 0.146_446_609_406_726_24];
        for step in 0..20 {
            assert!((factor(&config, step, 20) - of_epoch[step as usize / 5]).abs() < 1e-12, "{step}");
        }
    }
}
