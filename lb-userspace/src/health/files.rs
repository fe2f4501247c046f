//! Files that may not exist yet and may change at any time.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

/// No credential or CA bundle is larger; a mistaken path should not fill the memory.
const MAX_BYTES: u64 = 4 << 20;

/// What a file must look like to be the one we read last. Symbolic links are followed, so a changed link
/// (Kubernetes' mounted secrets) is a changed file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Some files and what was made of them, made again when one of them changes.
pub(super) struct Watched<T> {
    source: Source<T>,
    /// The stamps `value` was made from, or could not be made from.
    seen: Option<Vec<Stamp>>,
    /// The last good value.
    value: Option<T>,
    /// The last message logged, so that each is logged once.
    complaint: Option<String>,
}

/// What makes a value of the contents of some files.
pub(super) type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync>;

/// Which files, and what they mean.
pub(super) struct Source<T> {
    /// What it is, for messages: `client certificate`.
    pub(super) what: &'static str,
    /// Read together: the value needs them all.
    pub(super) paths: Vec<PathBuf>,
    /// Makes the value of the files' contents. The error says what is wrong with them, and never quotes them.
    pub(super) parse: Parse<T>,
    /// What the check does without it, for the warning.
    pub(super) without: &'static str,
    /// Go on with the last good value when a file vanishes.
    pub(super) outlives_its_file: bool,
}

/// What the files give at this moment.
pub(super) enum Reading<T> {
    /// The value, perhaps from before the files broke.
    Value(T),
    /// Not there yet.
    Absent,
    /// There, but of no use, and never was.
    Unusable(String),
}

enum Problem {
    Absent(PathBuf),
    Unreadable(String),
    Broken(String),
}

impl<T: Clone> Source<T> {
    fn label(&self) -> String {
        let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        format!("{} {}", self.what, paths.join(" and "))
    }

    /// Reads the files once. An absent one is [`Reading::Absent`].
    pub(super) fn read(&self) -> Reading<T> {
        match self.stamps().and_then(|_| self.load()) {
            Ok(value) => Reading::Value(value),
            Err(Problem::Absent(_)) => Reading::Absent,
            Err(Problem::Unreadable(text) | Problem::Broken(text)) => Reading::Unusable(text),
        }
    }

    /// What is wrong with a value that needs no file.
    pub(super) fn problem_inside(&self) -> Option<String> {
        match self.paths.is_empty().then(|| self.read()) {
            Some(Reading::Unusable(problem)) => Some(format!("its {}: {problem}", self.what)),
            _ => None,
        }
    }

    fn stamps(&self) -> Result<Vec<Stamp>, Problem> {
        self.paths
            .iter()
            .map(|path| {
                let metadata = fs::metadata(path).map_err(|error| problem(path, &error))?;
                if !metadata.is_file() {
                    return Err(Problem::Broken(format!("{} is not a file", path.display())));
                }
                Ok(Stamp {
                    device: metadata.dev(),
                    inode: metadata.ino(),
                    length: metadata.len(),
                    modified: (metadata.mtime(), metadata.mtime_nsec()),
                    changed: (metadata.ctime(), metadata.ctime_nsec()),
                })
            })
            .collect()
    }

    fn load(&self) -> Result<T, Problem> {
        let mut contents = Vec::new();
        for path in &self.paths {
            let mut bytes = Vec::new();
            File::open(path)
                .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
                .map_err(|error| problem(path, &error))?;
            if bytes.len() as u64 > MAX_BYTES {
                let limit = MAX_BYTES >> 20;
                return Err(Problem::Broken(format!("{} is larger than {limit} MiB", path.display())));
            }
            contents.push(bytes);
        }
        (self.parse)(&contents).map_err(Problem::Broken)
    }
}

fn problem(path: &std::path::Path, error: &io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Problem::Absent(path.to_owned()),
        _ => Problem::Unreadable(format!("cannot read {}: {error}", path.display())),
    }
}

impl<T: Clone> Watched<T> {
    pub(super) fn new(source: Source<T>) -> Self {
        Self { source, seen: None, value: None, complaint: None }
    }

    /// Other files from now on. What must outlive its file is kept until they give a value.
    pub(super) fn moved_to(self, source: Source<T>) -> Self {
        let value = self.value.filter(|_| source.outlives_its_file);
        Self { value, ..Self::new(source) }
    }

    /// The value as the files are now; reads them only when they have changed. Logs what changed for the worse,
    /// and the end of it, once.
    pub(super) fn current(&mut self) -> Reading<T> {
        match self.refresh() {
            Ok(()) => {}
            Err(Problem::Absent(path)) => {
                self.seen = None;
                if !self.source.outlives_its_file {
                    self.value = None;
                }
                let kept =
                    if self.value.is_some() { "the last good one is used" } else { self.source.without };
                let what = self.source.what;
                if self.complain(format!("{what}: {} does not exist; until it does, {kept}", path.display()))
                {
                    tracing::warn!("{}", self.complaint.as_deref().unwrap_or_default());
                }
            }
            Err(Problem::Unreadable(text) | Problem::Broken(text)) => {
                let kept = match self.value {
                    Some(_) => "the last good one is used",
                    None => "checks give no verdict",
                };
                let label = self.source.label();
                if self.complain(format!("{label}: {text}; until this is mended, {kept}")) {
                    tracing::error!("{}", self.complaint.as_deref().unwrap_or_default());
                }
            }
        }
        match (&self.value, &self.complaint) {
            (Some(value), _) => Reading::Value(value.clone()),
            (None, Some(complaint)) if self.seen.is_some() => Reading::Unusable(complaint.clone()),
            (None, _) => Reading::Absent,
        }
    }

    /// Brings `value` up to date, and leaves it alone when the files are worse than before.
    fn refresh(&mut self) -> Result<(), Problem> {
        let stamps = match self.source.stamps() {
            Ok(stamps) => stamps,
            Err(problem) => {
                if !matches!(problem, Problem::Absent(_)) {
                    // Something is there: "unusable", not "absent".
                    self.seen = Some(Vec::new());
                }
                return Err(problem);
            }
        };
        if self.seen.as_ref() == Some(&stamps) {
            return Ok(());
        }
        let loaded = self.source.load();
        // A file that could not be read is tried again, though its stamp be the same.
        self.seen = match loaded {
            Err(Problem::Unreadable(_)) => Some(Vec::new()),
            _ => Some(stamps),
        };
        self.value = Some(loaded?);
        if self.complaint.take().is_some() {
            tracing::info!("{}: read, in use from now on", self.source.label());
        }
        Ok(())
    }

    /// Whether this is news.
    fn complain(&mut self, complaint: String) -> bool {
        let news = self.complaint.as_ref() != Some(&complaint);
        self.complaint = Some(complaint);
        news
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn number(contents: &[Vec<u8>]) -> Result<u32, String> {
        let text = String::from_utf8_lossy(&contents[0]);
        text.trim().parse().map_err(|_| "not a number".to_owned())
    }

    fn watched(path: PathBuf, outlives_its_file: bool) -> Watched<u32> {
        let source = Source {
            what: "number",
            paths: vec![path],
            parse: Box::new(number),
            without: "none",
            outlives_its_file,
        };
        Watched::new(source)
    }

    /// The value, 0 for absent, or the complaint.
    fn read(watched: &mut Watched<u32>) -> Result<u32, String> {
        match watched.current() {
            Reading::Value(value) => Ok(value),
            Reading::Absent => Ok(0),
            Reading::Unusable(text) => Err(text),
        }
    }

    #[test]
    fn a_file_comes_changes_breaks_is_mended_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        let mut watched = watched(path.clone(), false);
        assert_eq!(read(&mut watched), Ok(0));
        fs::write(&path, "1").unwrap();
        assert_eq!(read(&mut watched), Ok(1));
        fs::write(&path, "22").unwrap();
        assert_eq!(read(&mut watched), Ok(22));
        fs::write(&path, "broken").unwrap();
        assert_eq!(read(&mut watched), Ok(22), "the last good one");
        assert!(watched.complaint.as_deref().unwrap().contains("not a number"));
        fs::write(&path, "333").unwrap();
        assert_eq!((read(&mut watched), &watched.complaint), (Ok(333), &None));
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut watched), Ok(0));
    }

    #[test]
    fn a_link_to_another_file_is_another_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("old"), "1").unwrap();
        fs::write(path("new"), "2").unwrap();
        symlink(path("old"), path("link")).unwrap();
        let mut watched = watched(path("link"), false);
        assert_eq!(read(&mut watched), Ok(1));
        symlink(path("new"), path("next")).unwrap();
        fs::rename(path("next"), path("link")).unwrap();
        assert_eq!(read(&mut watched), Ok(2));
    }

    #[test]
    fn a_mounted_secret_is_another_file_when_its_directory_is_swapped() {
        // As kubelet mounts a Secret: number -> ..data/number, ..data -> ..2024, and the latter is swapped.
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        for (version, number) in [("..2024", "1"), ("..2025", "2")] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("number"), number).unwrap();
        }
        symlink("..2024", path("..data")).unwrap();
        symlink("..data/number", path("number")).unwrap();
        let mut watched = watched(path("number"), false);
        assert_eq!(read(&mut watched), Ok(1));
        symlink("..2025", path("..data_tmp")).unwrap();
        fs::rename(path("..data_tmp"), path("..data")).unwrap();
        fs::remove_dir_all(path("..2024")).unwrap();
        assert_eq!(read(&mut watched), Ok(2));
    }

    #[test]
    fn what_protects_us_is_kept_while_its_new_place_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("old"), "1").unwrap();
        for (outlives, kept) in [(true, 1), (false, 0)] {
            let mut before = watched(path("old"), outlives);
            assert_eq!(read(&mut before), Ok(1));
            let mut after = before.moved_to(watched(path("new"), outlives).source);
            assert_eq!(read(&mut after), Ok(kept));
        }
    }

    #[test]
    fn what_protects_us_outlives_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        fs::write(&path, "1").unwrap();
        let mut watched = watched(path.clone(), true);
        assert_eq!(read(&mut watched), Ok(1));
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut watched), Ok(1));
    }

    #[test]
    fn broken_from_the_start_is_unusable_until_mended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        fs::write(&path, "broken").unwrap();
        let mut watched = watched(path.clone(), false);
        for _ in 0..2 {
            assert!(read(&mut watched).unwrap_err().contains("not a number"));
        }
        fs::write(&path, "1").unwrap();
        assert_eq!(read(&mut watched), Ok(1));
    }

    #[test]
    fn a_directory_is_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut watched = watched(directory.path().to_owned(), false);
        assert!(read(&mut watched).unwrap_err().contains("is not a file"));
    }

    #[test]
    fn each_change_is_logged_once() {
        use std::sync::{Arc, Mutex};
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Log {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        tracing::subscriber::with_default(subscriber, || {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("number");
            let mut watched = watched(path.clone(), false);
            let mut read_twice = || (read(&mut watched), read(&mut watched));
            let _ = read_twice();
            fs::write(&path, "hunter2").unwrap();
            let _ = read_twice();
            fs::write(&path, "1").unwrap();
            let _ = read_twice();
            fs::write(&path, "22").unwrap();
            let _ = read_twice();
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let levels: Vec<_> = log.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
        assert_eq!(levels, ["WARN", "ERROR", "INFO"], "{log}");
        assert!(!log.contains("hunter2"), "{log}");
    }
}
