//! Parity and arithmetic: rows with one answer, at their last sign, padded behind it. The answer's own place in the input is 0.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::super::sets::{Rules, labels, rule};
use super::super::{Side, Task, answers_only, below};
use crate::batches::Sample;

/// Bits, and whether the number of ones is odd. Ids: 0 padding, 1 for a bit of zero, 2 for a one.
#[derive(Debug, Clone, PartialEq)]
pub struct Parity {
    /// The fewest bits and the answer.
    pub min: usize,
    /// The most.
    pub max: usize,
}

impl Task for Parity {
    fn n_ids(&self) -> usize {
        3
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let size = rng.random_range(self.min.max(2)..=self.max);
        let mut tokens: Vec<u32> = (1..size).map(|_| 1 + below(rng, 2)).collect();
        let ones: u32 = tokens.iter().map(|id| id - 1).sum();
        let at = tokens.len() - 1;
        tokens.resize(seq_len, 0);
        answers_only(tokens, &[(at, 1 + ones % 2)])
    }
}

impl Rules for Parity {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let (bits, answer) = until_answer(row, 3, 0)?;
        sized(bits.len() + 1, [self.min, self.max])?;
        rule(bits.iter().all(|&id| id == 1 || id == 2), || format!("{bits:?}: before the answer are bits only"))?;
        let odd = bits.iter().fold(false, |odd, &id| odd != (id == 2));
        rule(answer == 1 + u32::from(odd), || format!("the answer is {}, not {answer}", 1 + u32::from(odd)))
    }
}

/// What comes up to the answer, and the answer; behind it is padding.
fn until_answer(row: &Sample, n_ids: usize, pad: u32) -> Result<(&[u32], u32), String> {
    let labels = labels(row, row.tokens.len(), n_ids)?;
    let &[(at, answer)] = &labels[..] else { return Err(format!("{} labels: a row has one answer", labels.len())) };
    let behind = row.tokens[at + 1..].iter().position(|&id| id != pad);
    rule(behind.is_none(), || {
        format!("position {}: behind the answer is padding", at + 1 + behind.unwrap_or_default())
    })?;
    Ok((&row.tokens[..=at], answer))
}

fn sized(size: usize, [min, max]: [usize; 2]) -> Result<(), String> {
    rule((min..=max).contains(&size), || format!("size {size} must be {min} to {max}"))
}

/// Ids of signs in [`Modular`]; digits come behind them.
const PLUS: u32 = 1;
const MINUS: u32 = 2;
const TIMES: u32 = 3;
const EQUALS: u32 = 4;
const DIGITS: u32 = 5;

/// Digits with + - * modulo a number, products first. Ids: 0 padding, + 1, - 2, * 3, = 4, digits from 5 on.
#[derive(Debug, Clone, PartialEq)]
pub struct Modular {
    /// The fewest signs, = and the answer counted; sizes are odd.
    pub min: usize,
    /// The most.
    pub max: usize,
    /// What is counted modulo.
    pub modulus: u32,
}

impl Modular {
    /// The smallest and the largest size: the odd numbers that the code makes of even ones.
    fn sizes(&self) -> [usize; 2] {
        [self.min, self.max].map(|size| (2 * size.div_ceil(2)).max(4) - 1)
    }
}

impl Task for Modular {
    fn n_ids(&self) -> usize {
        (DIGITS + self.modulus) as usize
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let [least, most] = self.sizes();
        let size = 2 * rng.random_range(least / 2..=most / 2) + 1;
        let m = self.modulus;
        let mut tokens = vec![DIGITS + below(rng, m as usize)];
        // The sum of the terms that are complete, and the term at hand with its sign.
        let (mut sum, mut term) = (0, tokens[0] - DIGITS);
        while tokens.len() + 2 < size {
            let (sign, digit) = (PLUS + below(rng, 3), below(rng, m as usize));
            tokens.extend([sign, DIGITS + digit]);
            match sign {
                TIMES => term = term * digit % m,
                _ => {
                    sum = (sum + term) % m;
                    term = if sign == PLUS { digit } else { (m - digit) % m };
                }
            }
        }
        let at = tokens.len();
        tokens.push(EQUALS);
        tokens.resize(seq_len, 0);
        answers_only(tokens, &[(at, DIGITS + (sum + term) % m)])
    }
}

impl Rules for Modular {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let (signs, answer) = until_answer(row, self.n_ids(), 0)?;
        sized(signs.len() + 1, self.sizes())?;
        let (&last, expression) = signs.split_last().ok_or("a row of nothing")?;
        rule(last == EQUALS && expression.len() % 2 == 1, || "an expression of digits and signs ends with =".into())?;
        let digit = |id: u32| id.checked_sub(DIGITS).ok_or_else(|| format!("id {id} is where a digit belongs"));
        // Terms, each a product; another way than that of the generator.
        let mut terms = vec![i64::from(digit(expression[0])?)];
        for pair in expression[1..].chunks(2) {
            let value = i64::from(digit(pair[1])?);
            match pair[0] {
                PLUS => terms.push(value),
                MINUS => terms.push(-value),
                TIMES => {
                    terms.iter_mut().rev().take(1).for_each(|term| *term = *term * value % i64::from(self.modulus))
                }
                other => return Err(format!("id {other} is where a sign belongs")),
            }
        }
        let wanted = DIGITS + terms.iter().sum::<i64>().rem_euclid(i64::from(self.modulus)) as u32;
        rule(answer == wanted, || format!("the answer is {wanted}, not {answer}"))
    }
}

/// Bracketed digits with + and - modulo a number. Ids: digits, +, -, *, (, ), =, padding. The place behind = is 0: here the
/// digit, not padding, as in the code.
#[derive(Debug, Clone, PartialEq)]
pub struct Brackets {
    /// The fewest signs, =, the answer and the end counted.
    pub min: usize,
    /// The most.
    pub max: usize,
    /// What is counted modulo.
    pub modulus: u32,
    /// Whether there are products too.
    pub mult: bool,
}

impl Brackets {
    /// The ids of + - * ( ) = and padding.
    fn signs(&self) -> [u32; 7] {
        [0, 1, 2, 3, 4, 5, 6].map(|sign| self.modulus + sign)
    }

    /// Appends an expression of so many signs, and gives its value.
    fn expression(&self, rng: &mut ChaCha8Rng, length: usize, out: &mut Vec<u32>) -> u32 {
        let ([plus, minus, _, open, close, ..], m) = (self.signs(), self.modulus);
        if length < 5 {
            let digit = below(rng, m as usize);
            if length > 2 {
                out.push(open);
            }
            let negative = length.is_multiple_of(2);
            if negative {
                out.push(minus);
            }
            out.push(digit);
            if length > 2 {
                out.push(close);
            }
            return if negative { (m - digit) % m } else { digit };
        }
        let left = rng.random_range(1..=length - 4);
        out.push(open);
        let a = self.expression(rng, left, out);
        let sign = plus + below(rng, if self.mult { 3 } else { 2 });
        out.push(sign);
        let b = self.expression(rng, length - 3 - left, out);
        out.push(close);
        match sign {
            sign if sign == plus => (a + b) % m,
            sign if sign == minus => (a + m - b) % m,
            _ => a * b % m,
        }
    }

    /// The value of the expression that begins at a place, and where it ends. Its brackets are counted, not its recursion: rows may
    /// be anything.
    fn value(&self, signs: &[u32]) -> Result<u32, String> {
        let ([plus, minus, times, open, close, ..], m) = (self.signs(), i64::from(self.modulus));
        // What is complete or begun, innermost last: values and signs, as a machine that shifts and reduces.
        #[derive(Clone, Copy, PartialEq)]
        enum Part {
            Sign(u32),
            /// With whether it is a bare digit, maybe with a minus.
            Value(i64, bool),
        }
        let mut stack: Vec<Part> = Vec::new();
        for &id in signs {
            let digit = i64::from(id) < m;
            match (digit, &stack[..]) {
                (true, [.., Part::Sign(sign)])
                    if *sign == minus && !matches!(stack.iter().rev().nth(1), Some(Part::Value(..))) =>
                {
                    stack.pop();
                    stack.push(Part::Value(-i64::from(id), true));
                }
                (true, _) => stack.push(Part::Value(i64::from(id), true)),
                (false, [rest @ .., Part::Sign(before), Part::Value(value, true)])
                    if id == close && *before == open =>
                {
                    let (length, value) = (rest.len(), *value);
                    stack.truncate(length);
                    stack.push(Part::Value(value, false));
                }
                (false, [rest @ .., Part::Sign(before), Part::Value(a, _), Part::Sign(sign), Part::Value(b, _)])
                    if id == close && *before == open =>
                {
                    let value = match *sign {
                        sign if sign == plus => a + b,
                        sign if sign == minus => a - b,
                        sign if sign == times && self.mult => a * b,
                        other => return Err(format!("id {other} is no sign between two expressions")),
                    };
                    let length = rest.len();
                    stack.truncate(length);
                    stack.push(Part::Value(value.rem_euclid(m), false));
                }
                (false, _) if id != close => stack.push(Part::Sign(id)),
                _ => return Err("a closing bracket without what it closes".into()),
            }
        }
        match stack[..] {
            [Part::Value(value, _)] => Ok(value.rem_euclid(m) as u32),
            _ => Err("the expression is not well formed".into()),
        }
    }
}

impl Task for Brackets {
    fn n_ids(&self) -> usize {
        self.modulus as usize + 7
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let [.., equals, pad] = self.signs();
        let size = rng.random_range(self.min.max(5)..=self.max);
        let mut tokens = Vec::with_capacity(seq_len);
        let value = self.expression(rng, size - 3, &mut tokens);
        let at = tokens.len();
        tokens.extend([equals, 0]);
        tokens.resize(seq_len, pad);
        answers_only(tokens, &[(at, value)])
    }
}

impl Rules for Brackets {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let [.., equals, pad] = self.signs();
        let labels = labels(row, row.tokens.len(), self.n_ids())?;
        let &[(at, answer)] = &labels[..] else { return Err(format!("{} labels: a row has one answer", labels.len())) };
        sized(at + 3, [self.min.max(5), self.max])?;
        rule(row.tokens[at] == equals, || format!("position {at}: {} where = belongs", row.tokens[at]))?;
        rule(row.tokens.get(at + 1) == Some(&0), || format!("position {}: the answer's place is 0", at + 1))?;
        let behind = row.tokens[at + 2..].iter().position(|&id| id != pad);
        rule(behind.is_none(), || {
            format!("position {}: behind the answer is padding", at + 2 + behind.unwrap_or_default())
        })?;
        let value = self.value(&row.tokens[..at])?;
        rule(answer == value, || format!("the answer is {value}, not {answer}"))
    }
}
