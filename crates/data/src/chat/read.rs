//! Files of conversations, row by row: what is kept, what is left out, and how many of each.

use std::path::PathBuf;

use super::indicator::Scores;
use super::tokenize::{Room, Rules, Text, texts};
use super::weights::weight;
use super::{ChatConfig, ChatTemplate, ChatTokens, TooLong, columns, limits, numbers};
use crate::files::{OnBad, Place, Row, Search, Sides, for_each_row, sides};
use crate::{DataError, Tokenizer};

/// What became of the rows of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Rows that there are.
    pub rows: usize,
    /// Left out because they cannot be used.
    pub bad: usize,
    /// Left out because they are too long.
    pub dropped: usize,
    /// Cut.
    pub truncated: usize,
    /// Of which several conversations are learned, as the template renders answers otherwise once more follow.
    pub several: usize,
    /// Calls of tools whose arguments are JSON in a text.
    pub arguments: usize,
    /// Answers that are not learned, as their messages say so.
    pub untrained: usize,
    /// Messages that are no answers and say that they are to be learned, which they are not.
    pub asked_in_vain: usize,
    /// Rows that say that nothing of them is to be learned, left out.
    pub weightless: usize,
    /// What users say that is marked, as the answer depends on the context.
    pub marked: usize,
    /// How many of the rows are for validation alone, the last ones.
    pub held_out: usize,
    /// Which files were read and which were left out, in words.
    pub left_out: Vec<String>,
}

/// Reads all conversations.
///
/// # Errors
/// If files are missing, or a row cannot be used and is not to be left out: file, line and reason.
pub(super) fn read_chats(
    config: &ChatConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
) -> Result<(Vec<ChatTokens>, Counts), DataError> {
    let template = config.template(tokenizer)?;
    let room = match config.too_long {
        TooLong::Error => Room::Told(seq_len),
        TooLong::Drop => Room::Most(seq_len),
        TooLong::Truncate => Room::Cut(seq_len),
    };
    let longest = tokenizer.longest_token();
    let rules = Rules { learn: config.learn, template: &template, tokenizer, room, longest };
    let scores = config.indicator.as_ref().map(Scores::read).transpose()?;
    let mut reader =
        Reader { config, rules, scores, scored: None, seq_len, chats: Vec::new(), counts: Counts::default() };
    limits::on_deep_stack(|| reader.all()).map_err(DataError::Unusable)??;
    let Reader { chats, counts, .. } = reader;
    if chats.is_empty() {
        return Err(unusable!("data.chat: of {} rows none is left to train on", counts.rows));
    }
    if chats.iter().all(|chat| chat.learned.iter().skip(1).all(|&learned| !learned)) {
        return Err(unusable!(
            "data.chat.template \"{}\": of {} conversations nothing is learned: the template writes no answer that a token stands \
             before",
            config.template,
            chats.len()
        ));
    }
    Ok((chats, counts))
}

struct Reader<'a> {
    config: &'a ChatConfig,
    rules: Rules<'a>,
    scores: Option<Scores<'a>>,
    /// The file that the scores are about.
    scored: Option<PathBuf>,
    seq_len: usize,
    chats: Vec<ChatTokens>,
    counts: Counts,
}

/// What a row says besides what is said in it.
#[derive(Default)]
struct Said {
    arguments: usize,
    untrained: usize,
    asked_in_vain: usize,
    marked: usize,
}

impl Reader<'_> {
    fn all(&mut self) -> Result<(), DataError> {
        let config = self.config;
        let Sides { train, validation, notes } = sides(&config.paths, &config.validation_paths)?;
        self.counts.left_out.extend(notes);
        self.files(&train)?;
        if let Some(files) = validation {
            // As they are: scores are about the others.
            self.scores = None;
            let before = self.counts.rows;
            self.files(&files)?;
            self.counts.held_out = self.counts.rows - before;
        }
        Ok(())
    }

    fn files(&mut self, files: &Search) -> Result<(), DataError> {
        let columns = self.config.columns.names();
        let left_out = for_each_row(files, &columns, &mut |place, row| self.row(row, place))?.note();
        self.counts.left_out.extend(left_out);
        Ok(())
    }

    fn row(&mut self, row: Row<'_>, place: Place<'_>) -> Result<(), DataError> {
        if self.scores.is_some() {
            let scored = self.scored.get_or_insert_with(|| place.path.to_owned());
            if *scored != place.path {
                return Err(unusable!(
                    "data.chat.indicator takes scores of one file, and data.chat.paths finds {} and {}: name one, or join them",
                    scored.display(),
                    place.path.display()
                ));
            }
        }
        let number = self.counts.rows;
        self.counts.rows += 1;
        let (texts, said) = match self.read(row, place.line) {
            Ok(read) => read,
            Err(problem) => return self.bad(problem, place),
        };
        self.counts.arguments += said.arguments;
        self.counts.untrained += said.untrained;
        self.counts.asked_in_vain += said.asked_in_vain;
        self.counts.marked += said.marked;
        self.counts.several += usize::from(texts.len() > 1);
        self.counts.weightless += usize::from(texts.is_empty());
        for text in texts {
            match text {
                Text::TooLong if self.config.too_long == TooLong::Error => {
                    return Err(place.wrong(too_long("its", self.seq_len)));
                }
                Text::TooLong => self.counts.dropped += 1,
                Text::Cut(chat) => {
                    self.counts.truncated += 1;
                    self.chats.push(ChatTokens { row: number, ..chat });
                }
                Text::Tokens(chat) if chat.tokens.len() > self.seq_len => {
                    return Err(place.wrong(too_long(&chat.tokens.len().to_string(), self.seq_len)));
                }
                Text::Tokens(chat) => self.chats.push(ChatTokens { row: number, ..chat }),
            }
        }
        Ok(())
    }

    fn read(&self, row: Row<'_>, line: usize) -> Result<(Vec<Text>, Said), String> {
        let mut chat = self.config.columns.read(&match row {
            Row::Json(json) => numbers::parse(json)?,
            fields => fields.value()?,
        })?;
        let mut said =
            Said { arguments: columns::arguments(&mut chat, self.config.decode_arguments)?, ..Said::default() };
        said.marked = self.scores.as_ref().map_or(Ok(0), |scores| scores.mark(&mut chat, line))?;
        for message in &chat.messages {
            let answer = message["role"] == "assistant";
            match weight(message)? {
                Some(false) if answer => said.untrained += 1,
                Some(true) if !answer => said.asked_in_vain += 1,
                _ => {}
            }
        }
        Ok((texts(&chat, self.rules)?, said))
    }

    fn bad(&mut self, problem: String, place: Place<'_>) -> Result<(), DataError> {
        self.counts.bad += 1;
        if self.config.on_bad_row == OnBad::Error {
            let hint = "data.chat.on_bad_row = \"skip\" leaves such rows out";
            return Err(place.wrong(format!("{problem}\n  hint: {hint}")));
        }
        let most = self.config.max_bad_rows;
        match self.counts.bad > most {
            true => Err(place.wrong(format!("{problem}\n  and more than data.chat.max_bad_rows ({most}) in all"))),
            false => Ok(()),
        }
    }
}

fn too_long(count: &str, seq_len: usize) -> String {
    format!(
        "{count} tokens are more than training.seq_len ({seq_len})\n  hint: data.chat.too_long = \"drop\" or \"truncate\""
    )
}

/// What the log says of all rows, one sentence for each thing that is left out or changed of them.
pub(super) fn notes(config: &ChatConfig, counts: &Counts, template: &ChatTemplate) -> Vec<String> {
    let mut notes = Vec::new();
    if counts.arguments > 0 {
        notes.push(match config.decode_arguments {
            true => format!("{} tool calls have their arguments as JSON in a text: decoded", counts.arguments),
            false => format!(
                "{} tool calls have their arguments as JSON in a text, which the template gets as a text: many templates write it in \
                 quotes, full of backslashes (`polyhead preview` shows it); data.chat.decode_arguments = true gives it the objects",
                counts.arguments
            ),
        });
    }
    if counts.untrained > 0 {
        notes.push(format!(
            "{} answers are not learned, as their messages say so (weight 0, or train false)",
            counts.untrained
        ));
    }
    if counts.asked_in_vain > 0 && config.learn != super::Learn::All {
        notes.push(format!(
            "{} messages that are no answers say that they are to be learned (weight 1, or train true) and are not: data.chat.learn = \
             \"all\" learns every message",
            counts.asked_in_vain
        ));
    }
    if let Some(indicator) = &config.indicator {
        notes.push(format!(
            "{} messages of users are marked with {}, as the scores of their answers are above {}",
            counts.marked, indicator.token, indicator.above
        ));
    }
    if config.date.is_some() && !template.source().contains("strftime_now") {
        notes.push("data.chat.date is set, and the template asks for no date".into());
    }
    if let Some(day) = template.day_by_default() {
        notes.push(format!(
            "data.chat.template \"{}\" asks for today's date (strftime_now) and gets {day}, so that the run can be repeated; \
             data.chat.date sets another day",
            config.template
        ));
    }
    notes
}
