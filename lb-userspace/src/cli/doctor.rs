//! `sheave doctor`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::builder::styling::{AnsiColor, Style};

use super::{
    block_on,
    output::{self, Screen, printable},
};
use crate::{
    config::{Config, ConfigError},
    doctor::{self, Finding, Level},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without a configuration file it looks at the host alone. Changes nothing, but backends see a SYN or two, and a daemon's flow table a flow that is ended at once.

Exit codes: 0 nothing stands in the way (there may be warnings), 1 something does, 2 wrong usage or configuration.")]
pub(super) struct Arguments {
    /// The configuration file [default: /etc/sheave/sheave.toml, if there is one]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The same facts as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    super::init_logging(None, "warn")?;
    let (config, warnings) = load(arguments.config.as_deref())?.unzip();
    let mut findings = config_warnings(warnings.unwrap_or_default());
    findings.extend(block_on(doctor::examine(config.as_ref()))?);
    if arguments.json {
        output::print_json(&serde_json::json!({ "findings": findings }))?;
    } else {
        output::print(&render(&findings, Screen::stdout().colours))?;
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Failure);
    Ok(if failed { ExitCode::from(super::FAILED) } else { ExitCode::SUCCESS })
}

/// The named file must be there, the usual one need not.
fn load(named: Option<&Path>) -> Result<Option<(Config, Vec<crate::config::Warning>)>, ConfigError> {
    match (named, Path::new(super::CONFIG_FILE)) {
        (Some(named), _) => Config::load(named).map(Some),
        (None, usual) if usual.exists() => Config::load(usual).map(Some),
        (None, _) => Ok(None),
    }
}

fn config_warnings(warnings: Vec<crate::config::Warning>) -> Vec<Finding> {
    warnings
        .iter()
        .map(|warning| Finding {
            level: Level::Warning,
            subject: "configuration".to_owned(),
            what: warning.one_line(),
            fix: None,
        })
        .collect()
}

fn render(findings: &[Finding], colours: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let (word, style) = match finding.level {
            Level::Ok => ("ok", AnsiColor::Green.on_default()),
            Level::Note => ("note", AnsiColor::Cyan.on_default()),
            Level::Warning => ("warning", AnsiColor::Yellow.on_default()),
            Level::Failure => ("failure", AnsiColor::Red.on_default().bold()),
        };
        let style = if colours { style } else { Style::new() };
        let (subject, what) = (printable(&finding.subject), printable(&finding.what));
        text.push_str(&format!("{style}{word:<7}{style:#}  {subject}: {what}\n"));
        // A fix may be several commands, a line each.
        for (number, line) in finding.fix.iter().flat_map(|fix| fix.lines()).enumerate() {
            let label = if number == 0 { "fix:" } else { "" };
            text.push_str(&format!("         {label:<4} {}\n", printable(line)));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (failures, warnings) = (count(Level::Failure), count(Level::Warning));
    text.push_str(&format!("\n{failures} failures, {warnings} warnings\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_shows_its_fix() {
        let finding = |level, what: &str, fix: Option<&str>| Finding {
            level,
            subject: "interface eth0".to_owned(),
            what: what.to_owned(),
            fix: fix.map(str::to_owned),
        };
        let findings = [
            finding(Level::Ok, "native XDP", None),
            finding(Level::Failure, "another XDP program (id 7)", Some("ip link set dev eth0 xdp off")),
            finding(Level::Warning, "LRO is on\u{1b}[31m", Some("ethtool -K eth0 lro off\nthen again")),
        ];
        assert_eq!(
            render(&findings, false),
            "ok       interface eth0: native XDP\n\
             failure  interface eth0: another XDP program (id 7)\n\
             \u{20}        fix: ip link set dev eth0 xdp off\n\
             warning  interface eth0: LRO is on\u{fffd}[31m\n\
             \u{20}        fix: ethtool -K eth0 lro off\n\
             \u{20}             then again\n\
             \n\
             1 failures, 1 warnings\n"
        );
        assert!(render(&findings, true).contains("\u{1b}[32mok"));
    }
}
