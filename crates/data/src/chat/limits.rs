//! How large a template may be. Templates come with folders from anywhere: none may fill the memory, run without end, or nest so
//! deep that reading it overflows the stack.

use std::cell::Cell;

/// Bytes of a template; the longest that are published have some 20,000. All bounds here are chosen by us.
const LONGEST: usize = 1 << 20;
/// Tags of a template, each of which may open a block in the last.
const MOST_TAGS: usize = 10_000;
/// Operators, brackets, filters and attributes of one tag, each of which may take the last as its operand.
const MOST_OPERATORS: usize = 5_000;
/// Of the thread that reads and runs templates. What is not used of it takes no memory.
const STACK: usize = 512 << 20;
/// Steps of one rendering, and as many more for each byte of the conversation. A step is one instruction, or 64 bytes written.
const STEPS: u64 = 4_000_000;
const STEPS_PER_BYTE: u64 = 20;

/// Why a template is not even read.
///
/// # Errors
/// The line, what there is too much of, and how much there may be.
pub(super) fn check(source: &str) -> Result<(), String> {
    if source.len() > LONGEST {
        return Err(format!("the chat template has {} bytes, and {LONGEST} are the most", source.len()));
    }
    let (mut line, mut tags) = (1, 0);
    let mut rest = source;
    let opens = |text: &str| {
        let begins = |at: &usize| matches!(text.as_bytes().get(at + 1), Some(b'%' | b'{' | b'#'));
        text.match_indices('{').map(|(at, _)| at).find(begins)
    };
    while let Some(at) = opens(rest) {
        line += rest[..at].matches('\n').count();
        let inside = &rest[at + 2..];
        tags += 1;
        if tags > MOST_TAGS {
            return Err(format!("line {line} of the chat template: more than {MOST_TAGS} tags"));
        }
        let (length, operators) = tag(&rest[at..]);
        if operators > MOST_OPERATORS {
            return Err(format!(
                "line {line} of the chat template: an expression of {operators} operators, and {MOST_OPERATORS} are the most"
            ));
        }
        line += inside[..length].matches('\n').count();
        rest = &inside[length..];
    }
    Ok(())
}

/// Of a text that begins with a tag: the bytes between what opens and what closes it, and how much in it may nest.
pub(super) fn tag(text: &str) -> (usize, usize) {
    let inside = &text[2..];
    if text.starts_with("{#") {
        return (inside.find("#}").unwrap_or(inside.len()), 0);
    }
    let close = if text.starts_with("{%") { "%}" } else { "}}" };
    let bytes = inside.as_bytes();
    let (mut at, mut count, mut open) = (0, 0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            _ if open == 0 && bytes[at..].starts_with(close.as_bytes()) => return (at, count),
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
            }
            b'[' | b'(' | b'{' => {
                open += 1;
                count += 1;
            }
            b']' | b')' | b'}' => open = open.saturating_sub(1),
            b'+' | b'-' | b'*' | b'/' | b'%' | b'~' | b'|' | b'.' | b'<' | b'>' | b'=' => count += 1,
            first if first.is_ascii_alphabetic() => {
                let word = bytes[at..].iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count();
                let word = &inside[at..at + word];
                count += usize::from(matches!(word, "not" | "and" | "or" | "if" | "else" | "is" | "in"));
                at += word.len() - 1;
            }
            _ => {}
        }
        at += 1;
    }
    (bytes.len(), count)
}

/// Steps that one rendering of so many bytes may take.
pub(super) fn steps(bytes: usize) -> u64 {
    STEPS + STEPS_PER_BYTE * bytes as u64
}

thread_local! {
    static DEEP: Cell<bool> = const { Cell::new(false) };
}

/// Does something on a thread with a stack that what [`check`] and [`steps`] let pass cannot overflow.
///
/// # Errors
/// If there is no thread to be had.
pub(super) fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    if DEEP.get() {
        return Ok(work());
    }
    let deep = || {
        DEEP.set(true);
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat templates".into()).stack_size(STACK);
        let thread = thread
            .spawn_scoped(scope, deep)
            .map_err(|cause| format!("no thread for chat templates, with a stack of {} MiB: {cause}", STACK >> 20))?;
        thread.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_nests_too_deep_is_not_read() {
        let refusal = |source: &str| check(source).unwrap_err();
        assert!(
            refusal(&format!("a\n{{{{ 1{} }}}}", "+1".repeat(20_000))).starts_with("line 2 of the chat template: ")
        );
        assert!(refusal(&format!("{{{{ {}1 }}}}", "not ".repeat(20_000))).contains("20000 operators"));
        assert!(
            refusal(&format!("{{% if {}1{} %}}", "(".repeat(20_000), ")".repeat(20_000))).contains("20001 operators")
        );
        assert!(refusal(&"{% if a %}".repeat(20_000)).contains("10000 tags"));
        assert!(refusal(&"a".repeat(2 << 20)).contains("2097152 bytes"));
        for fine in ["{{ '{{' }} {{ {'a': {'b': 1}} }} %} {# {{ #}", "{{ \"it's\" }}", "{{ unclosed 'text", "é{%é%}é"]
        {
            check(fine).unwrap();
        }
        assert_eq!(tag("{{ {'a': {}} }} b").0, " {'a': {}} ".len());
        assert_eq!(tag("{% set a = '%}' %} b").0, " set a = '%}' ".len());
    }
}
