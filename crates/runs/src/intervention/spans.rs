//! Whether the spans of an intervention are in the tokens that it is about to be used on.

use polyhead_models::intervention::{Context, Intervention, Presence};
use polyhead_models::{Batch, ConfigError, Decoder};
use polyhead_recipe::StatedIntervention;

use super::{check_known_roles, check_roles, placed};
use crate::{Failure, Trained};

/// Batches whose rows are counted: all that are used where they are fewer; chosen by us.
const COUNTED: u64 = 8;
/// Batches that are searched for a span which those do not have; chosen by us, the last takes seconds.
const SEARCHED: u64 = 10_000;

/// Batches that an intervention is about to be used on.
pub struct Rows<'a> {
    /// What their rows are called.
    pub called: &'a str,
    /// How many batches there are.
    pub batches: u64,
    /// One of them.
    pub batch: &'a dyn Fn(u64) -> Result<Batch, Failure>,
    /// Whether tokens are generated behind them.
    pub generates: bool,
}

/// Spans of an intervention in some rows.
struct Found {
    spans: Vec<Presence>,
    /// All rows that were looked at, in words.
    among: String,
    rows: usize,
}

impl Found {
    /// In the first batches, and in those behind them as long as a span is in none.
    fn find(own: &Intervention, rows: &Rows<'_>) -> Result<Self, Failure> {
        let (mut spans, mut looked_at): (Vec<Presence>, usize) = (Vec::new(), 0);
        for at in 0..rows.batches.min(SEARCHED) {
            if at >= COUNTED && spans.iter().all(|span| span.rows > 0) {
                break;
            }
            let batch = (rows.batch)(at)?;
            looked_at += batch.batch;
            let more = own.presence(&Context::of(&batch), batch.seq);
            match spans.is_empty() {
                true => spans = more,
                false => spans.iter_mut().zip(more).for_each(|(span, more)| span.rows += more.rows),
            }
        }
        Ok(Self { spans, among: format!("{looked_at} {}", rows.called), rows: looked_at })
    }

    /// A note for each span that is not in all rows.
    fn notes(&self) -> Vec<String> {
        let note = |Presence { field, rows, .. }: &Presence, span: String| {
            format!(
                "{field} of the intervention: {span} is in {rows} of {}, and changes nothing in the others",
                self.among
            )
        };
        let some = self.spans.iter().filter(|span| span.rows < self.rows);
        some.map(|span| note(span, span.written())).collect()
    }
}

/// Where no token is generated, a note for each edit that is for generated ones.
///
/// # Errors
/// If there is no other edit; with the place of the first one's phase.
pub fn check_phases(model: &Decoder, stated: Option<&StatedIntervention>) -> Result<Vec<String>, Failure> {
    let own = model.intervention().filter(|own| own.only_decodes());
    let Some(field) = own.and_then(|own| own.decode_edits().into_iter().next()) else {
        return Ok(note_phases(model, stated));
    };
    let problem = "phase (\"decode\") is that of every edit, and no token is generated here: the intervention changes nothing. generate, chat, \
                   serve and eval --task generate tokens; without phase an edit is of the prompt too";
    Err(placed(stated, &ConfigError::new(field, problem)))
}

/// A note for each edit that is for generated tokens, where none is generated.
pub fn note_phases(model: &Decoder, stated: Option<&StatedIntervention>) -> Vec<String> {
    let note = |field: String| {
        let problem = format!(
            "{field} of the intervention is \"decode\", and no token is generated here: the edit changes nothing"
        );
        let error = ConfigError::new(field, problem);
        stated.map_or_else(|| error.problem.clone(), |stated| stated.problem(&error).in_a_line())
    };
    model.intervention().map_or_else(Vec::new, |own| own.decode_edits().into_iter().map(note).collect())
}

/// Refuses spans that none of the rows has, and gives a note for each that some of them lack. They are searched in the first 8
/// batches, and in as many more (10,000 at most) as it takes to find each once. Of rows behind which nothing is generated, the phases of
/// edits are [checked](check_phases) too.
///
/// # Errors
/// Names the span or the phase, with its place; or if the rows cannot be read.
pub fn check_rows(
    model: &Decoder,
    stated: Option<&StatedIntervention>,
    rows: &Rows<'_>,
) -> Result<Vec<String>, Failure> {
    let Some(own) = model.intervention() else { return Ok(Vec::new()) };
    let mut notes = if rows.generates { Vec::new() } else { check_phases(model, stated)? };
    if rows.batches == 0 {
        return Ok(notes);
    }
    check_roles(model, stated, (rows.batch)(0)?.roles.is_some())?;
    let found = Found::find(own, rows)?;
    match found.spans.iter().find(|span| span.rows == 0) {
        Some(span) => Err(placed(stated, &ConfigError::new(span.field.clone(), span.missing(&found.among)))),
        None => {
            notes.extend(found.notes());
            Ok(notes)
        }
    }
}

/// The same notes, also where none of the rows has a span.
///
/// # Errors
/// If the rows cannot be read.
pub fn note_rows(model: &Decoder, rows: &Rows<'_>) -> Result<Vec<String>, Failure> {
    model.intervention().map_or(Ok(Vec::new()), |own| Ok(Found::find(own, rows)?.notes()))
}

/// Refuses tokens in which an intervention finds none of what it is to change: a text that is nowhere, a range behind the last of
/// `length` positions, or roles that nobody states.
///
/// # Errors
/// Names the span and the way out.
pub fn check_spans(
    own: Option<&Intervention>,
    stated: Option<&StatedIntervention>,
    context: &Context<'_>,
    length: usize,
) -> Result<(), Failure> {
    let Some(own) = own else { return Ok(()) };
    check_known_roles(own, stated, !context.roles.is_empty())?;
    let missing = own.presence(context, length).into_iter().find(|span| span.rows == 0 && !span.is_role());
    let problem = missing.map(|span| ConfigError::new(span.field.clone(), span.missing("the text")));
    problem.map_or(Ok(()), |problem| Err(placed(stated, &problem)))
}

impl Trained {
    /// Refuses tokens in which the model's intervention finds none of what it is to change, as [`check_spans`].
    ///
    /// # Errors
    /// Names the span and the way out.
    pub fn check_spans(&self, context: &Context<'_>, length: usize) -> Result<(), Failure> {
        check_spans(self.model.intervention(), self.intervention.as_ref(), context, length)
    }

    /// Where no token is generated: as [`check_phases`].
    ///
    /// # Errors
    /// If every edit of the model's intervention is for generated tokens.
    pub fn check_phases(&self) -> Result<Vec<String>, Failure> {
        check_phases(&self.model, self.intervention.as_ref())
    }

    /// Refuses rows of which none has a span of the model's intervention; gives a note for each span that some of them lack.
    ///
    /// # Errors
    /// Names the span and the way out; or if the rows cannot be read.
    pub fn check_rows(&self, rows: &Rows<'_>) -> Result<Vec<String>, Failure> {
        check_rows(&self.model, self.intervention.as_ref(), rows)
    }
}
