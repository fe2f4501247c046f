//! What the README and `docs/` say is what the code does: the parser, the counters, the commands and the admin socket
//! are asked what there is, and each of them must be written down.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use lb_common::outcome::{Action, Event, Outcome};
use lb_userspace::{
    admin::Status,
    config::{Config, Warning},
};

/// The README or a page of `docs/`.
struct Page {
    path: PathBuf,
    text: String,
}

impl Page {
    /// By its path from the root of the repository.
    fn read(path: &str) -> Self {
        let path = root().join(path);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, text }
    }

    /// The README and everything in `docs/`.
    fn all() -> Vec<Self> {
        let mut names = vec!["README.md".to_owned()];
        for entry in fs::read_dir(root().join("docs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name.ends_with(".md"), "docs/{name} is no page");
            names.push(format!("docs/{name}"));
        }
        names.iter().map(|name| Self::read(name)).collect()
    }

    /// The blocks in a language, each with the heading it is under and the number of its first line.
    fn blocks(&self, language: &str) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut heading = String::new();
        let mut lines = (1..).zip(self.text.lines());
        while let Some((number, line)) = lines.next() {
            if let Some(title) = heading_of(line) {
                title.clone_into(&mut heading);
            }
            let Some(fence) = line.trim_start().strip_prefix("```") else { continue };
            let body: Vec<_> = lines.by_ref().map(|(_, line)| line).take_while(|it| *it != "```").collect();
            if fence == language {
                let (text, heading) = (body.join("\n") + "\n", heading.clone());
                blocks.push(Block { heading, line: number + 1, text });
            }
        }
        blocks
    }

    /// The lines outside of blocks.
    fn prose(&self) -> Vec<&str> {
        let mut inside = false;
        let mut lines = Vec::new();
        for line in self.text.lines() {
            if line.trim_start().starts_with("```") {
                inside = !inside;
            } else if !inside {
                lines.push(line);
            }
        }
        assert!(!inside, "{}: a block is not closed", self.path.display());
        lines
    }

    /// The first cells of the table rows under each heading.
    fn rows(&self) -> BTreeMap<String, Vec<Vec<String>>> {
        let mut rows = BTreeMap::new();
        let mut under: &mut Vec<_> = rows.entry(String::new()).or_default();
        for line in self.prose() {
            if let Some(title) = heading_of(line) {
                under = rows.entry(title.to_owned()).or_default();
            } else if let Some(cells) = line.strip_prefix('|') {
                under.push(cells.split('|').map(|cell| cell.trim().to_owned()).collect());
            }
        }
        rows
    }
}

/// A block of code.
struct Block {
    heading: String,
    line: usize,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The words of a heading, without marks.
fn heading_of(line: &str) -> Option<&str> {
    line.starts_with('#').then(|| line.trim_start_matches('#').trim().trim_matches('`'))
}

/// What a cell that begins with something in backticks is about.
fn named(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.split('`').next()
}

// The configuration.

/// The smallest service; `backends` may be left to a block.
fn service(with_backends: bool) -> String {
    let backends = if with_backends { "backends = [\"192.168.2.151:6443\"]\n" } else { "" };
    format!("[[service]]\nname = \"kube-apiserver\"\nlisten = [\"192.168.2.140:6443\"]\n{backends}")
}

/// A block without a service is about a part of the file: it is given the smallest service to belong to.
fn completed(block: &str) -> String {
    if block.contains("[[service]]") {
        return block.to_owned();
    }
    service(!block.contains("[[service.backend]]")) + block
}

#[test]
fn every_configuration_is_right() {
    let mut found = 0;
    for page in Page::all() {
        for Block { line, text, .. } in page.blocks("toml") {
            let place = format!("{}:{line}", page.path.display());
            let text = completed(&text);
            match Config::parse(&text, "/etc/sheave/sheave.toml") {
                Err(error) => panic!("{place}: {error}\nin\n{text}"),
                Ok((_, warnings)) => {
                    let warnings: Vec<_> = warnings.iter().map(Warning::one_line).collect();
                    assert!(warnings.is_empty(), "{place} teaches what is warned of: {warnings:?}");
                }
            }
            found += 1;
        }
    }
    assert!(found > 5, "only {found} blocks");
}

#[test]
fn the_defaults_that_are_written_are_the_defaults() {
    let page = Page::read("docs/configuration.md");
    let blocks = page.blocks("toml");
    let [written] = blocks
        .iter()
        .filter(|block| block.heading == "Everything, with its defaults")
        .collect::<Vec<_>>()[..]
    else {
        panic!("not one block")
    };
    let parse = |text: &str| Config::parse(text, "/etc/sheave/sheave.toml").unwrap().0;
    assert_eq!(parse(&written.text), parse(&service(true)));
    let words: BTreeSet<_> =
        written.text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').collect();
    let rows = page.rows();
    for title in sections().keys().filter(|title| title.as_str() != "[[service.backend]]") {
        for row in rows.get(title).into_iter().flatten() {
            let built = !row.iter().any(|cell| cell.to_lowercase().contains("not built yet"));
            if let Some(key) = named(&row[0]).filter(|_| built) {
                assert!(words.contains(key), "the block has no {key}");
            }
        }
    }
}

/// Every key the parser knows, by the section it belongs to as the parser calls it. The parser says so itself, to
/// whoever writes a key that it does not know and that resembles none.
fn sections() -> BTreeMap<String, Vec<String>> {
    let mut sections = BTreeMap::new();
    let (_, tops) = known_keys("").expect("the file itself is a section");
    for top in tops {
        let Some((title, keys)) = known_in(&top, "") else { panic!("{top} is no section") };
        for key in &keys {
            let before = if title.starts_with("[[") { service(key != "backend") } else { String::new() };
            if let Some((title, keys)) = known_in(&format!("{top}.{key}"), &before) {
                sections.insert(title, keys);
            }
        }
        sections.insert(title, keys);
    }
    sections
}

/// The keys of `[section]` or `[[section]]`, whichever it is, behind some text.
fn known_in(section: &str, before: &str) -> Option<(String, Vec<String>)> {
    let headers = [format!("[{section}]"), format!("[[{section}]]")];
    headers.iter().find_map(|header| known_keys(&format!("{before}{header}\n")))
}

/// The section that `text` ends in, and its keys; None when it does not end in a section.
fn known_keys(text: &str) -> Option<(String, Vec<String>)> {
    let error = Config::parse(&format!("{text}\"?\" = 0\n"), "sheave.toml").err()?.to_string();
    let title = error.lines().next()?.strip_prefix("unknown key \"?\"")?;
    let keys = error.split_once("known here: ").expect("the parser lists what it knows").1;
    Some((
        title.trim_start_matches(" in ").to_owned(),
        keys.lines().next()?.split(", ").map(str::to_owned).collect(),
    ))
}

#[test]
fn every_key_is_documented_and_nothing_else() {
    let sections = sections();
    assert!(["[vip]", "[[service]]", "[service.check]"].iter().all(|title| sections.contains_key(*title)));
    let rows = Page::read("docs/configuration.md").rows();
    for (title, keys) in &sections {
        let Some(table) = rows.get(title) else { panic!("docs/configuration.md has no heading {title}") };
        let is_section = |key: &&String| {
            let name = format!("{}.{key}", title.trim_matches(['[', ']']));
            sections.contains_key(&format!("[{name}]")) || sections.contains_key(&format!("[[{name}]]"))
        };
        let known: BTreeSet<_> = keys.iter().filter(|key| !is_section(key)).map(String::as_str).collect();
        let documented: BTreeSet<_> = table.iter().filter_map(|row| named(&row[0])).collect();
        assert_eq!(documented, known, "{title}: documented, and known to the parser");
        for row in table.iter().filter(|row| named(&row[0]).is_some()) {
            assert!(row.len() >= 4 && row[..4].iter().all(|cell| !cell.is_empty()), "{title}: {row:?}");
        }
    }
}

// The counters.

#[test]
fn every_counter_is_documented_in_its_place() {
    let rows = Page::read("docs/data-path.md").rows();
    let rows = &rows["Counters"];
    let verdict = |action: Action| match action {
        Action::Pass => "pass",
        Action::Transmit => "transmit",
        Action::Drop => "drop",
    };
    let written: Vec<_> = rows.iter().filter_map(|row| Some((named(&row[0])?, row[1].as_str()))).collect();
    let (outcomes, events) = written.split_at(Outcome::ALL.len().min(written.len()));
    // In order, because the log of packets names an outcome by its number.
    let expected: Vec<_> =
        Outcome::ALL.iter().map(|outcome| (outcome.name(), verdict(outcome.action()))).collect();
    assert_eq!(outcomes, expected);
    let events: Vec<_> = events.iter().map(|(name, _)| *name).collect();
    assert_eq!(events, Event::ALL.iter().map(|event| event.name()).collect::<Vec<_>>());
}

// The commands.

/// What `sheave ARGUMENTS --help` prints.
fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sheave")).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The indented lines under a title of a help text.
fn listed<'help>(help: &'help str, title: &str) -> Vec<&'help str> {
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    lines.take_while(|line| line.starts_with(' ')).map(str::trim).collect()
}

#[test]
fn every_command_is_documented_with_its_options() {
    let rows = Page::read("docs/operating.md").rows();
    let rows = &rows["Commands"];
    let help_text = help(&[]);
    let commands: Vec<_> =
        listed(&help_text, "Commands:").iter().filter_map(|line| line.split(' ').next()).collect();
    assert!(commands.contains(&"run"), "{help_text}");
    let documented: BTreeSet<_> =
        rows.iter().filter_map(|row| named(&row[0])?.strip_prefix("sheave ")).collect();
    assert_eq!(documented, commands.iter().copied().collect(), "documented, and there");
    for command in commands {
        let row = rows.iter().find(|row| named(&row[0]) == Some(&format!("sheave {command}"))).unwrap();
        let help_text = help(&[command]);
        let options: BTreeSet<_> = listed(&help_text, "Options:")
            .iter()
            .filter(|line| line.starts_with('-'))
            .filter_map(|line| line.split([' ', ',']).find(|word| word.starts_with("--")))
            .filter(|option| *option != "--help")
            .collect();
        let documented: BTreeSet<_> =
            row[1].split(['`', ' ', ',']).filter(|word| word.starts_with("--")).collect();
        assert_eq!(documented, options, "sheave {command}: documented, and there");
    }
}

// The admin socket.

#[test]
fn the_status_is_documented_as_it_is_answered() {
    let blocks = Page::read("docs/admin-api.md").blocks("json");
    let [block] = blocks.as_slice() else { panic!("not one block") };
    let status: Status = serde_json::from_str(&block.text).unwrap();
    let written: serde_json::Value = serde_json::from_str(&block.text).unwrap();
    assert_eq!(serde_json::to_value(&status).unwrap(), written, "every field, and none that is not there");
    let known: BTreeSet<_> = lb_common::outcome::Counter::all().map(|counter| counter.name()).collect();
    assert!(status.packets.keys().all(|name| known.contains(name.as_str())), "{:?}", status.packets);
}

// The links.

/// The targets of the links in a line: `[text](target)`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// The name by which a heading is linked to, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|it| it.is_alphanumeric() || [' ', '-', '_'].contains(it));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn every_link_leads_somewhere() {
    let mut followed = 0;
    for page in Page::all() {
        for target in page.prose().into_iter().flat_map(targets).filter(|it| !it.contains("://")) {
            let place = format!("{} links to {target}", page.path.display());
            let (file, wanted) = target.split_once('#').map_or((target, None), |(file, at)| (file, Some(at)));
            let path =
                if file.is_empty() { page.path.clone() } else { page.path.parent().unwrap().join(file) };
            assert!(path.exists(), "{place}, and there is no such file");
            if let Some(wanted) = wanted {
                let page = Page { text: fs::read_to_string(&path).unwrap(), path };
                let mut headings = page.prose().into_iter().filter_map(heading_of);
                assert!(
                    headings.any(|heading| anchor(heading) == wanted),
                    "{place}, and no heading is named so"
                );
            }
            followed += 1;
        }
    }
    assert!(followed > 10, "only {followed} links");
}

#[test]
fn every_page_is_linked_from_the_readme() {
    let readme = Page::read("README.md");
    let linked: BTreeSet<_> = readme.prose().into_iter().flat_map(targets).collect();
    for page in Page::all().iter().skip(1) {
        let name = format!("docs/{}", page.path.file_name().unwrap().to_str().unwrap());
        assert!(linked.contains(name.as_str()), "the README does not link to {name}");
    }
}
