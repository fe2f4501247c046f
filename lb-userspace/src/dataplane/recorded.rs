//! What is pinned, as anybody may look at it: without a daemon, without a lock, changing nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use aya::maps::{Map, MapData};
use lb_common::{
    flow::{V4, V6},
    layout::{self, SNAT_ADDRESSES},
};

use super::{CONTROL, DataplaneError, FlightRecorder, Mapped, known::endpoint, pins, snat::Places};

/// Why there is nothing to look at.
#[derive(Debug, thiserror::Error)]
pub enum RecordedError {
    /// Nothing is pinned.
    #[error(
        "there is no black box in {}: sheave does not run on this host, or was unloaded\n   = help: run this where the \
         VIP is; a `dataplane.pin_dir` of your own is found with --config FILE", .0.display()
    )]
    Nothing(PathBuf),
    /// Of another version.
    #[error(
        "the maps in {} are of another version of sheave ({found})\n   = help: ask with the version that runs: \
         `/proc/$(pidof sheave)/exe why …`", .root.display()
    )]
    OtherLayout {
        /// The pin directory.
        root: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// The kernel said no.
    #[error("cannot look into {}: {reason}\n   = help: run this command as root", .path.display())]
    Open {
        /// The directory or pin.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
    /// The map is not what it should be.
    #[error(transparent)]
    Map(#[from] DataplaneError),
}

/// The black box, and who is who in it.
pub struct Recorded {
    /// What was written.
    pub flight_recorder: FlightRecorder,
    /// Ids and addresses of backends.
    pub backends: Vec<(u8, SocketAddr)>,
    /// Ids and addresses of listeners.
    pub listeners: Vec<(u8, SocketAddr)>,
    /// By the numbers that slots have for them, of IPv4 and of IPv6.
    pub snat_addresses: [Vec<Option<IpAddr>>; 2],
}

impl Recorded {
    /// Opens what is pinned below `root`.
    ///
    /// # Errors
    /// When there is nothing, or it cannot be read.
    pub fn open(root: &Path) -> Result<Self, RecordedError> {
        let directory = pins::layout_directory(root);
        if let Err(reason) = directory.metadata() {
            return Err(missing(root, reason));
        }
        let control = open::<layout::Control>(&directory, CONTROL)?;
        let (backends, listeners, config) = (control.backends(), control.listeners(), control.config());
        let backend = |id| {
            let entry = backends.get(id).filter(|entry| entry.family != 0)?;
            Some((u8::try_from(id).ok()?, endpoint(entry.family, entry.address, entry.port)))
        };
        let listener = |id| {
            let entry = listeners.read(id).filter(|entry| entry.family != 0)?;
            Some((u8::try_from(id).ok()?, endpoint(entry.family, entry.address, entry.port)))
        };
        Ok(Self {
            flight_recorder: FlightRecorder::over(open(&directory, super::flight_recorder::MAP)?)?,
            backends: (0..backends.len()).filter_map(backend).collect(),
            listeners: (0..listeners.len()).filter_map(listener).collect(),
            snat_addresses: config.read(0).map_or_else(Default::default, |config| {
                let (v4, v6) =
                    (Places::of::<V4>(&config, SNAT_ADDRESSES), Places::of::<V6>(&config, SNAT_ADDRESSES));
                [v4.addresses(), v6.addresses()]
            }),
        })
    }
}

fn missing(root: &Path, reason: io::Error) -> RecordedError {
    if reason.kind() != io::ErrorKind::NotFound {
        return RecordedError::Open { path: root.to_owned(), reason };
    }
    match pins::other_layouts(root) {
        found if found.is_empty() => RecordedError::Nothing(root.to_owned()),
        found => RecordedError::OtherLayout { root: root.to_owned(), found },
    }
}

fn open<T>(directory: &Path, name: &'static str) -> Result<Mapped<T>, RecordedError> {
    let path = pins::map_path(directory, name);
    let map = MapData::from_pin(&path).and_then(Map::from_map_data);
    let map = map.map_err(|error| RecordedError::Open { path, reason: io::Error::other(error) })?;
    Ok(Mapped::new(name, &map)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_is_pinned_the_error_says_where_to_look() {
        let directory = tempfile::tempdir().unwrap();
        let error = Recorded::open(directory.path()).err().unwrap();
        assert!(matches!(error, RecordedError::Nothing(_)), "{error}");
        assert!(error.to_string().contains("--config FILE"), "{error}");
        std::fs::create_dir(directory.path().join("layout_0123456789abcdef")).unwrap();
        let error = Recorded::open(directory.path()).err().unwrap();
        assert!(error.to_string().contains("another version of sheave (layout_0123456789abcdef)"), "{error}");
    }
}
