//! The kinds of models that a recipe may be about. All that differs between them is in one file each: `decoder.rs`,
//! `classifier.rs`, `embedder.rs`, `super_resolution.rs`.

use burn::tensor::Device;
use polyhead_evaluation::sets::SetScore;
use polyhead_kernels::seed_random;
use polyhead_models::mup::Scalings;
use polyhead_models::{Classifier, Decoder, Embedder, SuperResolution, Trainable};
use polyhead_recipe::{ModelConfig, Recipe};
use polyhead_training::TrainableModel;
use polyhead_training::run::Probe;

use crate::costs::Known;
use crate::data::TrainingData;
use crate::error::Failure;
use crate::resolve::{Resolved, scalings};
use crate::result::ClassTable;

/// A kind of model: from a recipe to what is trained, and on what.
pub trait Kind: TrainableModel {
    /// Its data, opened.
    type Data: TrainingData<Self::Batch>;

    /// What the data tells about the size of the model: of tokens without reading them.
    ///
    /// # Errors
    /// If the data is missing or malformed.
    fn known(resolved: &Resolved) -> Result<Known, Failure> {
        Ok(Self::open(resolved, &mut |_, _| {})?.known())
    }

    /// Opens the data; `progress` takes bytes read and bytes in all.
    ///
    /// # Errors
    /// If the data is missing or malformed, or does not fit the model.
    fn open(resolved: &Resolved, progress: &mut dyn FnMut(u64, u64)) -> Result<Self::Data, Failure>;

    /// The model before the first step, nothing frozen yet. The seed has been set.
    ///
    /// # Errors
    /// If weights cannot be read or do not fit.
    fn first(resolved: &Resolved, data: &Self::Data, device: &Device) -> Result<Self, Failure>;

    /// What mixes positions, layer by layer.
    fn layers(&self) -> Vec<&'static str>;

    /// The model, if it is a decoder, which can generate text.
    fn as_decoder(&self) -> Option<&Decoder> {
        None
    }

    /// What the recipe multiplies the learning rates of its parameters by.
    fn scalings(&self, recipe: &Recipe) -> Scalings {
        self.as_decoder().map_or_else(Scalings::default, |decoder| scalings(recipe, decoder))
    }

    /// What is measured about the model beside its loss, where the recipe's data asks for something.
    ///
    /// # Errors
    /// If what it is asked cannot be tokenized.
    fn probe(&self, recipe: &Recipe, data: &Self::Data) -> Result<Option<Box<Probe<'static, Self>>>, Failure> {
        let _ = (recipe, data);
        Ok(None)
    }

    /// What is measured about its heads along the training, where the recipe asks for it.
    ///
    /// # Errors
    /// If the held-out data cannot be read.
    fn head_scores(recipe: &Recipe, data: &Self::Data) -> Result<Option<Box<Probe<'static, Self>>>, Failure> {
        let _ = (recipe, data);
        Ok(None)
    }

    /// The score on each named part of the held-out data, all of it.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn set_scores(&self, data: &Self::Data) -> Result<Vec<SetScore>, Failure> {
        let _ = data;
        Ok(Vec::new())
    }

    /// How well each class is told apart, for models that tell classes.
    fn class_table(data: &Self::Data, totals: &<Self as Trainable>::Totals) -> Option<ClassTable> {
        let _ = (data, totals);
        None
    }
}

/// Something that is done for a recipe whatever kind its model is.
pub trait ForAnyKind {
    /// What it gives.
    type Output;

    /// Does it for one kind.
    fn run<K: Kind>(self) -> Self::Output;
}

/// Does something for the kind of a recipe's model: the one place where kinds are told apart.
pub fn for_kind<F: ForAnyKind>(model: &ModelConfig, what: F) -> F::Output {
    match model {
        ModelConfig::Decoder { .. } => what.run::<Decoder>(),
        ModelConfig::Classifier { .. } => what.run::<Classifier>(),
        ModelConfig::Embedder(_) => what.run::<Embedder>(),
        ModelConfig::SuperResolution(_) => what.run::<SuperResolution>(),
    }
}

impl Resolved {
    /// What the data tells about the size of the model: of tokens without reading them.
    ///
    /// # Errors
    /// If examples are missing or malformed.
    pub fn known(&self) -> Result<Known, Failure> {
        struct Ask<'a>(&'a Resolved);
        impl ForAnyKind for Ask<'_> {
            type Output = Result<Known, Failure>;

            fn run<K: Kind>(self) -> Self::Output {
                K::known(self.0)
            }
        }
        for_kind(&self.recipe.model, Ask(self))
    }

    /// A hash of the files that the data is read from, where it is; they are read.
    ///
    /// # Errors
    /// If the data is missing or malformed.
    pub fn text_hash(&self) -> Result<Option<String>, Failure> {
        struct Hash<'a>(&'a Resolved);
        impl ForAnyKind for Hash<'_> {
            type Output = Result<Option<String>, Failure>;

            fn run<K: Kind>(self) -> Self::Output {
                Ok(K::open(self.0, &mut |_, _| {})?.text_hash().map(Into::into))
            }
        }
        for_kind(&self.recipe.model, Hash(self))
    }

    /// The model before the first step. What the recipe freezes is not trained.
    ///
    /// # Errors
    /// If weights cannot be read or do not fit, or what is to be frozen or added to does not exist.
    pub fn first<K: Kind>(&self, data: &K::Data, device: &Device) -> Result<K, Failure> {
        seed_random(self.recipe.debug.seed);
        Ok(self.recipe.freeze.apply(K::first(self, data, device)?)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_models::weights::{FrozenDtype, NonFinite};
    use polyhead_recipe::from_layers;
    use polyhead_recipe::layers::parse_layer;

    use super::*;
    use crate::costs::Costs;
    use crate::resolve::{self, begin_run};
    use crate::{Caller, open_trained};

    const DECODER: &str = "[model.decoder]\nd_model = 8\nn_layers = 2\n[model.decoder.attention.softmax]\nn_heads = 2\n\
                           [data.markov]\nstates = 5\n[training]\nsteps = 2\nseq_len = 6\nbatch_size = 2\n";
    const CLASSIFIER: &str = "[model.classifier.vision_transformer]\npatch_size = 4\nd_model = 8\nn_layers = 1\n\
                              [model.classifier.vision_transformer.attention.softmax]\nn_heads = 2\n\
                              [data.shapes]\nsize = 16\nn_classes = 3\n[training]\nsteps = 2\nbatch_size = 4\n";

    const SUPER_RESOLUTION: &str = "[model.super_resolution]\nscale = 2\nd_model = 8\nn_layers = 1\nn_heads = 2\nqk_dim = 4\n\
                                    d_ff = 8\nlocal_patch = 4\n[model.super_resolution.mixer.attention.softmax]\n\
                                    n_heads = 2\n[data.patterns]\nsize = 16\n[training]\nsteps = 2\nbatch_size = 3\n";

    fn caller() -> Caller {
        Caller {
            nonfinite: NonFinite::Refuse,
            frozen: FrozenDtype::F32,
            tell: |_| {},
            progress: |_, _, _| {},
            base: None,
            hub: |_| Ok(None),
            hub_cache: std::path::PathBuf::new,
        }
    }

    fn resolved(recipe: &str) -> Resolved {
        let loaded = from_layers(vec![parse_layer("a.toml", recipe).unwrap()]).unwrap();
        resolve::resolve(&loaded, caller()).unwrap()
    }

    /// What is counted before anything is made is what is made, and the data fits it.
    #[test]
    fn every_kind_is_opened_made_and_counted_alike() {
        struct Check<'a>(&'a Resolved, [u64; 3]);
        impl ForAnyKind for Check<'_> {
            type Output = ();

            fn run<K: Kind>(self) {
                let Self(resolved, [rows, tokens, layers]) = self;
                let data = K::open(resolved, &mut |_, _| {}).unwrap();
                assert_eq!(data.known(), resolved.known().unwrap());
                let model: K = resolved.first(&data, &Device::flex().autodiff()).unwrap();
                let costs = Costs::of(&resolved.recipe, data.known());
                assert_eq!(model.num_params() as u64, costs.totals.parameters);
                assert_eq!(costs.tokens_per_step, rows * tokens);
                assert_eq!(Kind::layers(&model), vec!["softmax"; layers as usize]);
                let batch = data.train().batch(0).unwrap();
                assert!(
                    model
                        .loss_under(&batch, Default::default())
                        .cross_entropy
                        .into_data()
                        .iter::<f32>()
                        .all(f32::is_finite)
                );
                assert!(data.record()["description"].is_string() && data.text_hash().is_none());
            }
        }
        for (recipe, sizes) in [(DECODER, [2, 6, 2]), (CLASSIFIER, [4, 1, 1]), (SUPER_RESOLUTION, [3, 1, 1])] {
            let resolved = resolved(recipe);
            for_kind(&resolved.recipe.model, Check(&resolved, sizes));
        }
    }

    #[test]
    fn a_run_folder_leads_back_to_its_model() {
        let folder = tempfile::tempdir().unwrap();
        let resolved = resolved(DECODER);
        let data = Decoder::open(&resolved, &mut |_, _| {}).unwrap();
        let model: Decoder = resolved.first(&data, &Device::flex()).unwrap();
        begin_run(folder.path(), &model, resolved.recipe.clone(), Vec::new(), caller()).unwrap();
        let trained = open_trained(folder.path(), None, caller()).unwrap();
        let numbers = |model: &Decoder| {
            polyhead_models::weights::named(model).into_iter().map(|one| one.values).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&trained.model), numbers(&model));
        assert_eq!(trained.recipe.unwrap().model.decoder(), Some(model.config()));
        let none = open_trained(&folder.path().join("nowhere"), None, caller()).err().unwrap().to_string();
        assert!(none.contains("no such checkpoint or run folder"), "{none}");
    }
}
