//! A data path as it is right after loading, made of one that was in use. Tests need hundreds of them, and the verifier
//! takes longer for the program than most tests take for all the rest.

use std::collections::BTreeMap;

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};

use super::{Dataplane, DataplaneError, Mapped, Settings, SocketTable, outlives, sum};

impl Dataplane {
    /// For tests: the same programs over the same maps, which hold what the kernel makes new maps with: zeros, and no
    /// entries. Nothing else is taken over. It must not be attached, and no program may be running. `settings` may only differ
    /// from those that the program was loaded with in what is neither in the program nor the size of a map: SNAT
    /// addresses (as many of each family), their ports, and the secret.
    ///
    /// # Errors
    /// Where the kernel refuses to read or write a map.
    pub fn emptied(mut self, settings: &Settings) -> Result<Self, DataplaneError> {
        self.remove_entries()?;
        let Self { ebpf, .. } = self;
        for (_, words) in arrays(&ebpf)? {
            words.zero();
        }
        let mut dataplane = Self::over_maps(ebpf)?;
        dataplane.loaded = dataplane.read_clock()?;
        dataplane.configure(settings)?;
        Ok(dataplane)
    }

    /// For tests: what the maps hold, by name: of arrays the words, of counters the sums over all CPUs, of others the number of
    /// entries.
    ///
    /// # Errors
    /// Where the kernel refuses to read a map.
    pub fn contents(&self) -> Result<BTreeMap<&str, Vec<u64>>, DataplaneError> {
        let words = |map: Mapped<u64>| (0..map.len()).filter_map(|index| map.read(index)).collect();
        let mut contents: BTreeMap<_, Vec<u64>> =
            arrays(&self.ebpf)?.into_iter().map(|(name, map)| (name, words(map))).collect();
        for (name, map) in [
            ("COUNTER", &self.counters),
            ("BACKEND_FLOWS", &self.backend_flows),
            ("BACKEND_SOCKETS", &self.backend_sockets),
        ] {
            let counts = (0..map.len()).map(|index| sum(map, name, index));
            contents.insert(name, counts.collect::<Result<_, _>>()?);
        }
        contents.insert("FOLLOWED_SOCKETS", vec![SocketTable::of(&self.ebpf)?.all()?.len() as u64]);
        contents.insert("ALLOW", vec![self.allow.keys().count() as u64]);
        Ok(contents)
    }

    /// Empties the maps that are not in this process's memory.
    fn remove_entries(&mut self) -> Result<(), DataplaneError> {
        for (name, map) in [
            ("COUNTER", &mut self.counters),
            ("BACKEND_FLOWS", &mut self.backend_flows),
            ("BACKEND_SOCKETS", &mut self.backend_sockets),
        ] {
            zero(map).map_err(|source| DataplaneError::Map { name, source })?;
        }
        let error = |source| DataplaneError::Map { name: "ALLOW", source };
        let prefixes: Vec<_> = self.allow.keys().collect::<Result<_, _>>().map_err(error)?;
        prefixes.iter().try_for_each(|prefix| self.allow.remove(prefix)).map_err(error)?;
        let mut sockets = SocketTable::of(&self.ebpf)?;
        for socket in sockets.all()? {
            sockets.forget(&socket)?;
        }
        Ok(())
    }
}

/// The arrays, by name, as words in this process's memory.
fn arrays(ebpf: &Ebpf) -> Result<Vec<(&str, Mapped<u64>)>, DataplaneError> {
    ebpf.maps()
        .filter(|(name, map)| outlives(name) && matches!(map, Map::Array(_)))
        .map(|(name, map)| Ok((name, Mapped::words("(any array)", map)?)))
        .collect()
}

/// Writes zeros where there is anything else.
fn zero(map: &mut PerCpuArray<MapData, u64>) -> Result<(), MapError> {
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    for index in 0..map.len() {
        if map.get(&index, 0)?.iter().any(|count| *count != 0) {
            map.set(index, PerCpuValues::try_from(vec![0; cpus])?, 0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;

    use super::super::{OBJECT, outlives};

    /// A map that is neither an array nor in this list would keep what a test before has left in it.
    #[test]
    fn every_map_is_an_array_or_emptied_by_its_name() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        let is_array = |map: &aya_obj::Map| map.map_type() == BPF_MAP_TYPE_ARRAY as u32;
        let others: BTreeSet<_> = object
            .maps
            .iter()
            .filter(|(name, map)| outlives(name) && !is_array(map))
            .map(|(name, _)| name.as_str())
            .collect();
        // DIALLED is socket storage: it goes with its sockets.
        let emptied = ["ALLOW", "BACKEND_FLOWS", "BACKEND_SOCKETS", "COUNTER", "DIALLED", "FOLLOWED_SOCKETS"];
        assert_eq!(others, BTreeSet::from(emptied));
    }
}
