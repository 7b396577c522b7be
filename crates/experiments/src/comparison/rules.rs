//! What a comparison's file may not say, each rule with the key that it is about.

use polyhead_models::{ConfigError, require};
use polyhead_recipe::folder_name;
use polyhead_recipe::layers::Layer;

use super::{CheckTask, Comparison, Matched, NAMED, Preparation, STEPS, in_braces};
use crate::tune::leaves;

/// Preparations that are written as flags in a string, which was the only form until tables were read.
pub(super) fn flags_in_strings(layer: &Layer) -> Vec<String> {
    let preparations = layer.values().get("prepare").and_then(toml::Value::as_array);
    let keys = preparations.into_iter().flatten().enumerate().flat_map(|(at, preparation)| {
        let is_string = move |key: &&str| preparation.get(key).is_some_and(toml::Value::is_str);
        ["convert", "grow"].into_iter().filter(is_string).map(move |key| format!("prepare.{at}.{key}"))
    });
    keys.map(|key| {
        format!(
            "{}: {key} is flags in a string; write a table, such as {{ width = 2 }}: the string will be refused",
            layer.name
        )
    })
    .collect()
}

/// Rules about the comparison itself, each with the key it is about.
pub(super) fn rules(comparison: &Comparison, check_task: CheckTask) -> Vec<ConfigError> {
    let Comparison { seeds, arm, .. } = comparison;
    let tolerance = comparison.tolerance();
    let names: Vec<&str> = arm.iter().map(|arm| arm.name.as_str()).collect();
    let known = |name: &str| names.contains(&name);
    let listed = || names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let mut problems = Vec::new();
    let mut rule = |holds: bool, key: String, message: String| {
        problems.extend(require(holds, &key, || message).err());
    };
    rule(!seeds.is_empty(), "seeds".into(), "seeds is empty: give at least one, better three or more".into());
    for (at, seed) in seeds.iter().enumerate() {
        rule(!seeds[..at].contains(seed), "seeds".into(), format!("seeds: {seed} is there twice"));
    }
    rule(arm.len() > 1, "arm".into(), format!("a comparison takes two arms or more; there is {}", arm.len()));
    for (at, name) in names.iter().enumerate() {
        let key = format!("arm.{at}.name");
        rule(!names[..at].contains(name), key.clone(), format!("arm `{name}`: two arms have this name"));
        rule(!folder_name(name).is_empty(), key, format!("arm `{name}`: its name must hold a letter or a digit"));
    }
    if let Some(ladder) = &comparison.ladder {
        let message = "setting: ladder makes settings of its sizes already, each of which can change more";
        rule(comparison.setting.is_empty(), "setting".into(), message.into());
        ladder.problems().into_iter().for_each(|error| rule(false, error.field, error.problem));
    }
    let settings: Vec<String> = comparison.setting.iter().map(|setting| folder_name(&setting.name)).collect();
    for (at, name) in settings.iter().enumerate() {
        rule(
            !name.is_empty() && !settings[..at].contains(name),
            format!("setting.{at}.name"),
            format!(
                "setting `{}`: a name must hold a letter or a digit, and differ from the others",
                comparison.setting[at].name
            ),
        );
    }
    if let Some(base) = &comparison.base {
        rule(known(base), "base".into(), format!("base: no arm is called \"{base}\"; there are {}", listed()));
    }
    rule(
        (0.0..=1.0).contains(&tolerance),
        "tolerance".into(),
        format!("tolerance ({tolerance}) must be 0 to 1, a share of the target"),
    );
    let sought = arm.iter().enumerate().map(|(at, arm)| (format!("arm.{at}.solve"), &arm.solve));
    for (key, solve) in [("solve".to_owned(), &comparison.solve)].into_iter().chain(sought) {
        let steps = solve.as_deref().is_none_or(|solve| solve == STEPS);
        rule(
            steps || comparison.matched != Matched::Time,
            key,
            format!("solve: match = \"time\" seeks {STEPS}, and no other key: leave it out"),
        );
    }
    for flags in &comparison.evaluate {
        let problem = check_task(flags).err();
        rule(problem.is_none(), "evaluate".into(), format!("evaluate: {}", problem.unwrap_or_default()));
    }
    for (at, preparation) in comparison.prepare.iter().enumerate() {
        let Preparation { name, from, train, convert, grow, embedding, recipe } = preparation;
        let (key, earlier) = (format!("prepare.{at}.name"), &comparison.prepare[..at]);
        rule(
            !folder_name(name).is_empty() && earlier.iter().all(|other| folder_name(&other.name) != folder_name(name)),
            key.clone(),
            format!("prepare `{name}`: a name must hold a letter or a digit, and differ from the others"),
        );
        let given = [train.is_some(), convert.is_some(), grow.is_some(), embedding.is_some()];
        let given = given.into_iter().filter(|given| *given).count();
        rule(
            given == 1,
            key.clone(),
            format!("prepare `{name}`: give exactly one of train, convert, grow and embedding"),
        );
        rule(
            train.is_some() || embedding.is_some() || recipe.is_empty(),
            format!("prepare.{at}.recipe"),
            format!("prepare `{name}`: recipe changes what is trained, or what prompts are made of, and nothing is"),
        );
        rule(
            from.as_ref().map_or(train.is_some(), |from| {
                earlier.iter().any(|other| other.name == *from && other.embedding.is_none())
            }),
            if from.is_some() { format!("prepare.{at}.from") } else { key },
            format!("prepare `{name}`: from must name an earlier preparation of a model, which it is made of"),
        );
    }
    for (at, arm) in arm.iter().enumerate() {
        for [table, key] in NAMED {
            let named = arm.recipe.get(table).and_then(|table| table.get(key)?.as_str()).and_then(in_braces);
            let made = |name: &str| comparison.prepare.iter().find(|made| made.name == name);
            let wanted = |made: &Preparation| made.embedding.is_some() == (key == "tensors");
            let what = if key == "tensors" { "an embedding" } else { "a model" };
            rule(
                named.is_none_or(|name| made(name).is_some_and(wanted)),
                format!("arm.{at}.recipe.{table}.{key}"),
                format!("arm `{}`: no preparation called \"{}\" makes {what}", arm.name, named.unwrap_or_default()),
            );
        }
    }
    for (key, value) in leaves(&comparison.sweep, &|_| false) {
        let some = value.as_array().is_some_and(|values| !values.is_empty());
        rule(some, format!("sweep.{key}"), format!("sweep: {key} must be a list of values to choose from"));
    }
    if let Some(tune) = &comparison.tune {
        rule(
            comparison.sweep.is_empty(),
            "sweep".into(),
            "sweep: tune tries settings already; lists can be among its ranges".into(),
        );
        let ConfigError { field, problem } = tune.trials().err().unwrap_or_else(|| ConfigError::new("", ""));
        rule(problem.is_empty(), field, problem);
    }
    for (at, claim) in comparison.claim.iter().enumerate() {
        let key = format!("claim.{at}.arms");
        rule(claim.arms.len() > 1, key.clone(), "claim: name two arms or more, the first is compared with".into());
        for name in &claim.arms {
            rule(known(name), key.clone(), format!("claim: no arm is called \"{name}\"; there are {}", listed()));
        }
        let setting = claim.setting.as_ref();
        rule(
            setting.is_none_or(|name| comparison.setting.iter().any(|setting| setting.name == *name)),
            format!("claim.{at}.setting"),
            format!("claim: no setting is called \"{}\"", setting.map_or("", String::as_str)),
        );
    }
    problems
}
