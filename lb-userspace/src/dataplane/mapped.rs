//! An array map in this process's memory: the boundary behind which the rest of the daemon sees plain values.

use std::{
    fs::File,
    os::fd::AsFd,
    ptr::{NonNull, slice_from_raw_parts_mut},
    sync::Arc,
};

use aya::maps::{Map, MapData};
use lb_common::layout::{Backend, Classifier, Config, Control, Listener, Service};
use memmap2::{MmapOptions, MmapRaw};

use super::DataplaneError;

/// The values of a `BPF_F_MMAPABLE` array map, or a part of its only one. The kernel programs read and write them at the same time.
pub struct Mapped<T> {
    memory: Arc<MmapRaw>,
    values: NonNull<T>,
    length: usize,
}

// SAFETY: the memory is the map's and lives as long as `memory`; T is words, each accessed whole.
unsafe impl<T: Send> Send for Mapped<T> {}
// SAFETY: as above; shared values are read by volatile loads or are cells.
unsafe impl<T: Sync> Sync for Mapped<T> {}

impl<T> Mapped<T> {
    /// Maps the map called `name`.
    pub fn new(name: &'static str, map: &Map) -> Result<Self, DataplaneError> {
        // The kernel rounds values up to eight bytes.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let data = data(map).ok_or(DataplaneError::NotAnArray { name })?;
        let info = data.info().map_err(|source| DataplaneError::MapInfo { name, source })?;
        if info.value_size() as usize != size_of::<T>() {
            return Err(DataplaneError::ValueSize {
                name,
                expected: size_of::<T>(),
                found: info.value_size(),
            });
        }
        Self::of_length(name, data, info.max_entries() as usize)
    }

    /// Maps `length` values, which must be all that there is in the map.
    fn of_length(name: &'static str, data: &MapData, length: usize) -> Result<Self, DataplaneError> {
        let error = |source| DataplaneError::MapMemory { name, source };
        let file = File::from(data.fd().as_fd().try_clone_to_owned().map_err(error)?);
        let memory = MmapOptions::new().len(length * size_of::<T>()).map_raw(&file).map_err(error)?;
        let memory = Arc::new(memory);
        let values = NonNull::new(memory.as_mut_ptr().cast::<T>())
            .ok_or_else(|| error(std::io::Error::other("mapped at zero")))?;
        Ok(Self { memory, values, length })
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Are there none? The kernel makes no such map.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of map memory.
    pub fn bytes(&self) -> usize {
        self.length * size_of::<T>()
    }

    /// A value made of cells, to be read and changed word by word.
    pub fn get(&self, index: usize) -> Option<&T> {
        // SAFETY: in range, aligned (the kernel aligns values to eight bytes and maps whole pages), and the kernel
        // changes it only word by word.
        (index < self.length).then(|| unsafe { &*self.values.as_ptr().add(index) })
    }
}

impl Mapped<u64> {
    /// Maps the map called `name` as words, whatever its values are.
    pub(super) fn words(name: &'static str, map: &Map) -> Result<Self, DataplaneError> {
        let data = data(map).ok_or(DataplaneError::NotAnArray { name })?;
        let info = data.info().map_err(|source| DataplaneError::MapInfo { name, source })?;
        // The kernel rounds values up to eight bytes.
        let words = info.value_size().div_ceil(8) as usize;
        Self::of_length(name, data, info.max_entries() as usize * words)
    }

    /// Makes all words zero, in a map that no program is looking at.
    pub(super) fn zero(&self) {
        // SAFETY: in range, and any word may be zero.
        unsafe { self.values.as_ptr().write_bytes(0, self.length) }
    }
}

/// The parts of the control map.
impl Mapped<Control> {
    /// What is the same for all packets.
    pub fn config(&self) -> Mapped<Config> {
        // SAFETY: an address within the value.
        self.part(slice_from_raw_parts_mut(unsafe { &raw mut (*self.values.as_ptr()).config }, 1))
    }

    /// Services, by id.
    pub fn services(&self) -> Mapped<Service> {
        // SAFETY: as above.
        self.part(unsafe { &raw mut (*self.values.as_ptr()).services })
    }

    /// Listeners, by id.
    pub fn listeners(&self) -> Mapped<Listener> {
        // SAFETY: as above.
        self.part(unsafe { &raw mut (*self.values.as_ptr()).listeners })
    }

    /// Backends, by id.
    pub fn backends(&self) -> Mapped<Backend> {
        // SAFETY: as above.
        self.part(unsafe { &raw mut (*self.values.as_ptr()).backends })
    }

    /// Whose a packet may be.
    pub fn classifier(&self) -> Mapped<Classifier> {
        // SAFETY: as above.
        self.part(slice_from_raw_parts_mut(unsafe { &raw mut (*self.values.as_ptr()).classifier }, 1))
    }

    fn part<T>(&self, values: *mut [T]) -> Mapped<T> {
        // SAFETY: within the value, which is somewhere.
        let first = unsafe { NonNull::new_unchecked(values.cast::<T>()) };
        Mapped { memory: self.memory.clone(), values: first, length: values.len() }
    }
}

impl Mapped<Backend> {
    /// Writes an entry that nobody refers to yet.
    pub fn place(&self, index: usize, entry: Backend) {
        assert!(index < self.length, "index {index} of {}", self.length);
        // SAFETY: in range; the id is new, so no program and no slot looks at the entry.
        unsafe { self.values.as_ptr().add(index).write(entry) }
    }
}

impl<T: Copy> Mapped<T> {
    /// A copy of a value.
    pub fn read(&self, index: usize) -> Option<T> {
        // SAFETY: in range; only plain values are Copy.
        (index < self.length).then(|| unsafe { self.values.as_ptr().add(index).read_volatile() })
    }

    /// Writes a value. Words are written whole, but one after the other: nobody may depend on more than one of them
    /// before the last is written.
    pub fn write(&self, index: usize, value: T) {
        assert!(index < self.length, "index {index} of {}", self.length);
        // SAFETY: in range.
        unsafe { self.values.as_ptr().add(index).write_volatile(value) }
    }
}

fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data) => Some(data),
        _ => None,
    }
}
