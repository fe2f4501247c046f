//! Debian's archive beyond the suites of this machine: a private configuration of apt, whose lists and files are in a
//! directory of this workspace. The system's lists, caches and packages stay as they are.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};

use crate::{apt, process};

/// Suites that may have kernels; a mirror need not have each.
const SUITES: &str = "oldstable oldstable-backports stable stable-backports testing unstable";
/// The same of the security archive.
const SECURITY_SUITES: &str = "oldstable-security stable-security";
/// Lists older than this are read again.
const FRESH: Duration = Duration::from_hours(24);

/// apt with lists and a cache of its own.
#[derive(Debug)]
pub(super) struct Archive {
    directory: PathBuf,
}

/// A package as the lists describe it: its fields by name.
pub(super) type Fields = BTreeMap<String, String>;

impl Archive {
    /// Reads the lists of the suites, unless that was done a short while ago.
    ///
    /// # Errors
    ///
    /// This is no Debian, its sources name no mirror, or the mirror does not answer.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        ensure!(apt::is_here(), "only Debian's kernels can be had, by apt-get, which is not here");
        let archive = Self { directory: directory.to_owned() };
        for part in ["state/lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("making {}", directory.join(part).display()))?;
        }
        fs::write(directory.join("status"), "")?;
        fs::write(directory.join("apt.conf"), configuration(directory))?;
        let sources = sources(&Mirrors::of_this_machine()?);
        let file = directory.join("archive.sources");
        let is_same = fs::read_to_string(&file).is_ok_and(|before| before == sources);
        if is_same && archive.is_fresh() {
            return Ok(archive);
        }
        fs::write(&file, sources)?;
        archive.update()?;
        Ok(archive)
    }

    fn stamp(&self) -> PathBuf {
        self.directory.join("lists-read")
    }

    fn is_fresh(&self) -> bool {
        let read = fs::metadata(self.stamp()).and_then(|metadata| metadata.modified());
        read.is_ok_and(|read| SystemTime::now().duration_since(read).is_ok_and(|age| age < FRESH))
    }

    /// A suite that cannot be read is said by apt, and the others count.
    fn update(&self) -> Result<()> {
        process::phase(
            "reading the lists of Debian's other suites (apt-get update, in a directory of its own)",
        );
        let read = process::output(self.command("apt-get").args(["--quiet", "--quiet", "update"]));
        if let Err(error) = read {
            process::phase(format_args!("{error:#}"));
        }
        ensure!(!self.names("linux-image-")?.is_empty(), "the mirror's lists could not be read");
        fs::write(self.stamp(), "")?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.directory.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    /// The names of all packages that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// apt-cache fails.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The newest version of a package.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(super) fn show(&self, package: &str) -> Result<Fields> {
        let text = process::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(fields(&text))
    }

    /// The file of a package, downloaded where it is not here.
    ///
    /// # Errors
    ///
    /// The download fails.
    pub(super) fn fetch(&self, package: &str) -> Result<PathBuf> {
        let directory = self.directory.join("packages");
        let find = || -> Result<Option<PathBuf>> {
            let prefix = format!("{package}_");
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let name = entry.file_name();
                let Some(name) = name.to_str() else { continue };
                if name.starts_with(&prefix) && name.ends_with(".deb") {
                    return Ok(Some(entry.path()));
                }
            }
            Ok(None)
        };
        if let Some(path) = find()? {
            return Ok(path);
        }
        process::phase(format_args!("downloading {package}"));
        let mut download = self.command("apt-get");
        download.args(["--quiet", "--quiet", "download", package]).current_dir(&directory);
        process::run(download.stdin(Stdio::null()).stdout(Stdio::null()))?;
        find()?.with_context(|| format!("apt-get downloaded no file of {package}"))
    }
}

/// Where this machine's packages come from.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mirrors {
    debian: String,
    security: Option<String>,
    signed_by: Option<String>,
}

impl Mirrors {
    fn of_this_machine() -> Result<Self> {
        let targets =
            process::output(Command::new("apt-get").args(["indextargets", "Created-By: Packages"]))?;
        Self::read(&targets).context("this machine's package sources name no mirror of Debian's")
    }

    /// From what `apt-get indextargets` prints. The label is the archive's own, from its signed Release file.
    fn read(targets: &str) -> Option<Self> {
        let mut mirrors = Self::default();
        for target in targets.split("\n\n").map(fields) {
            let Some(address) = target.get("Repo-URI") else { continue };
            match target.get("Label").map(String::as_str) {
                Some("Debian") if mirrors.debian.is_empty() => {
                    mirrors.debian.clone_from(address);
                    mirrors.signed_by =
                        target.get("Signed-By").filter(|keyring| keyring.starts_with('/')).cloned();
                }
                Some("Debian-Security") => mirrors.security = Some(address.clone()),
                _ => {}
            }
        }
        (!mirrors.debian.is_empty()).then_some(mirrors)
    }
}

/// The fields of one stanza.
fn fields(stanza: &str) -> Fields {
    let pairs = stanza.lines().filter(|line| !line.starts_with(' ')).filter_map(|line| line.split_once(": "));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn sources(mirrors: &Mirrors) -> String {
    let keyring = mirrors.signed_by.as_deref().unwrap_or("/usr/share/keyrings/debian-archive-keyring.gpg");
    let source = |address: &str, suites: &str| {
        format!("Types: deb\nURIs: {address}\nSuites: {suites}\nComponents: main\nSigned-By: {keyring}\n\n")
    };
    let security = mirrors.security.iter().map(|address| source(address, SECURITY_SUITES));
    [source(&mirrors.debian, SUITES)].into_iter().chain(security).collect()
}

/// Read after the system's configuration, so that a proxy that is set there is used. What the system does after an
/// update would change the system's own files.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        r#"#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Dir::State "{directory}/state";
Dir::State::status "{directory}/status";
Dir::Cache "{directory}/cache";
Dir::Etc::sourcelist "{directory}/archive.sources";
Dir::Etc::sourceparts "{directory}/no-other-sources";
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_that_this_machine_uses() {
        let targets = "MetaKey: main/binary-amd64/Packages\nLabel: other\nRepo-URI: http://other.example/\n\n\
                       Label: Debian\nRepo-URI: http://mirror.example/debian/\nSigned-By: /keys/debian.gpg\n\n\
                       Label: Debian-Security\nRepo-URI: http://mirror.example/security/\n";
        let mirrors = Mirrors::read(targets).expect("a mirror");
        assert_eq!(mirrors.debian, "http://mirror.example/debian/");
        let text = sources(&mirrors);
        assert!(text.contains("URIs: http://mirror.example/debian/\nSuites: oldstable "), "{text}");
        assert!(
            text.contains("URIs: http://mirror.example/security/\nSuites: oldstable-security "),
            "{text}"
        );
        assert_eq!(text.matches("Signed-By: /keys/debian.gpg").count(), 2);
        assert_eq!(Mirrors::read("Label: Ubuntu\nRepo-URI: http://mirror.example/ubuntu/\n"), None);
    }
}
