//! The addresses that flows leave from, and how they change while there are flows.
//!
//! The flow table has places for several SNAT addresses of a family, 64,512 slots each. A flow's hash puts it into one of
//! 256 buckets, and buckets are dealt out to the addresses by rendezvous (Thaler, Ravishankar 1998), so that one more
//! address moves only its own share. A bucket that moves knows both addresses: new flows leave from the one, older
//! ones are looked for at the other, until the last of them has ended. Then the bucket is *settled*, and an address that
//! is nobody's any more gives its place back.
//!
//! A bucket moves in two stores with a grace period between them: first every program looks at both addresses, then new
//! flows leave from the other one. So two copies of a SYN find each other also while that happens
//! (`lb_common::flow`, `loom_model`).

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::{
    cell::Cell8,
    flow::{Family, Slot, V4, V6},
    hash,
    layout::{BUCKETS, Bucket, Config, SETS_PER_ADDRESS, SNAT_PLACES, enter_snat, family},
};

use super::{Dataplane, DataplaneError, address_of, grace, words};

/// Why other SNAT addresses cannot be had now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnatError {
    /// Every place is taken.
    #[error(
        "the flow table has places for {room} SNAT addresses of a family (dataplane.snat_addresses_max), and {} needs \
         another{}", .address, and_leaving(.leaving)
    )]
    NoPlace {
        /// The one that finds none.
        address: IpAddr,
        /// How many there are.
        room: usize,
        /// Addresses that have a place until their last flow has ended.
        leaving: Vec<IpAddr>,
    },
    /// No table was made for the family.
    #[error("the flow table was made without {0}")]
    NoFamily(&'static str),
    /// Flows would be at three addresses.
    #[error(
        "flows are still on their way from the addresses of an earlier change, from which they would move again: wait until \
         those that leave from {} have ended (`sheave flows` shows them)", names(.0)
    )]
    Unsettled(Vec<IpAddr>),
}

fn and_leaving(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return String::new();
    }
    format!("; {} has no new flows and its place until the last old one has ended", names(addresses))
}

fn names(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Who is where, of one family.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Places {
    /// By index, as slots number them.
    addresses: Vec<Option<IpAddr>>,
    buckets: [Bucket; BUCKETS],
}

impl Places {
    /// A table that was never used, with room for so many.
    pub(super) fn empty(room: usize) -> Self {
        Self { addresses: vec![None; room], buckets: [Bucket::default(); BUCKETS] }
    }

    /// As the maps have it.
    pub(super) fn of<F: Family>(config: &Config, room: usize) -> Self {
        let mut places = Self::empty(room);
        for (index, place) in places.addresses.iter_mut().enumerate().take(F::snat_count(config) as usize) {
            let address = address_of(F::NUMBER, F::snat(config, index));
            *place = (!address.is_unspecified()).then_some(address);
        }
        places.buckets = std::array::from_fn(|bucket| F::bucket(config, bucket));
        places
    }

    /// By index, up to the last that is taken.
    pub(super) fn addresses(&self) -> Vec<Option<IpAddr>> {
        let taken = self.addresses.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.addresses[..taken].to_vec()
    }

    /// Those that new flows leave from.
    pub(super) fn in_use(&self) -> Vec<IpAddr> {
        let now: BTreeSet<_> = self.buckets.iter().map(|bucket| bucket.now() as usize).collect();
        now.into_iter().filter_map(|index| self.addresses.get(index).copied().flatten()).collect()
    }

    /// Those from which older flows leave whose bucket has new ones elsewhere.
    fn unsettled(&self) -> Vec<IpAddr> {
        let moved = self.buckets.iter().filter(|bucket| !bucket.is_settled());
        let before: BTreeSet<_> = moved.map(|bucket| bucket.before() as usize).collect();
        before.into_iter().filter_map(|index| self.addresses.get(index).copied().flatten()).collect()
    }

    /// The same with these addresses for new flows. Those that are here keep their places. A bucket whose flows are
    /// still at two addresses moves to none but these: it follows when it is settled.
    pub(super) fn with(&self, wanted: &[IpAddr]) -> Result<Self, SnatError> {
        let mut next = self.clone();
        let room = self.addresses.len();
        let mut indices = Vec::with_capacity(wanted.len());
        for address in wanted {
            let here = next.addresses.iter().position(|place| place.as_ref() == Some(address));
            let index = here.or_else(|| next.addresses.iter().position(Option::is_none));
            let Some(index) = index else {
                return Err(SnatError::NoPlace { address: *address, room, leaving: next.without(wanted) });
            };
            next.addresses[index] = Some(*address);
            indices.push(index as u8);
        }
        if wanted.is_empty() {
            return Ok(next);
        }
        let was_empty = self.addresses.iter().all(Option::is_none);
        let dealt = deal(wanted);
        for (bucket, choice) in next.buckets.iter_mut().zip(dealt) {
            let (now, before) = (bucket.now() as u8, bucket.before() as u8);
            let ideal = indices[choice];
            let may_stay = |index: &u8| indices.contains(index);
            let moves_to = if bucket.is_settled() || [now, before].contains(&ideal) {
                ideal
            } else if let Some(other) = [now, before].into_iter().find(may_stay) {
                other
            } else {
                return Err(SnatError::Unsettled(self.unsettled()));
            };
            *bucket = match moves_to {
                _ if was_empty => Bucket::new(moves_to, moves_to),
                same if same == now => *bucket,
                other => Bucket::new(other, now),
            };
        }
        Ok(next)
    }

    fn without(&self, wanted: &[IpAddr]) -> Vec<IpAddr> {
        self.addresses.iter().flatten().filter(|address| !wanted.contains(address)).copied().collect()
    }

    /// On the way to `next`: flows are looked for at both addresses already, and new ones leave from the old.
    fn before(&self, next: &Self) -> Self {
        let pair = |(from, to): (&Bucket, &Bucket)| {
            if from.now() == to.now() { *to } else { Bucket::new(from.now() as u8, to.now() as u8) }
        };
        let mut buckets = self.buckets.iter().zip(&next.buckets).map(pair);
        let buckets = std::array::from_fn(|_| buckets.next().unwrap_or_default());
        Self { addresses: next.addresses.clone(), buckets }
    }

    /// Notes that flows of no other buckets are where new ones are not, and takes the places of addresses that nobody
    /// needs any more and that are not `wanted`. Returns those addresses.
    fn settle(&mut self, moved: &[bool; BUCKETS], wanted: &[IpAddr]) -> Vec<IpAddr> {
        for (bucket, _) in self.buckets.iter_mut().zip(moved).filter(|(_, moved)| !**moved) {
            *bucket = Bucket::new(bucket.now() as u8, bucket.now() as u8);
        }
        let named: BTreeSet<_> =
            self.buckets.iter().flat_map(|it| [it.now() as usize, it.before() as usize]).collect();
        let is_over = |(index, place): &(usize, &mut Option<IpAddr>)| {
            !named.contains(index) && !place.is_some_and(|address| wanted.contains(&address))
        };
        let places = self.addresses.iter_mut().enumerate();
        places.filter(is_over).filter_map(|(_, place)| place.take()).collect()
    }

    #[cfg(test)]
    fn is_settled(&self) -> bool {
        self.buckets.iter().all(|bucket| bucket.is_settled())
    }
}

/// Deals the buckets out to the addresses, by their position.
fn deal(addresses: &[IpAddr]) -> [usize; BUCKETS] {
    let most = BUCKETS.div_ceil(addresses.len().max(1));
    let mut loads = vec![0; addresses.len()];
    std::array::from_fn(|bucket| {
        let score = |index: &usize| {
            let [high, low] = words(addresses[*index]);
            hash::split_mix(hash::split_mix(high ^ low.rotate_left(1)) ^ bucket as u64)
        };
        // Bounded, because an address that got more than its share would be full before the others.
        let best = (0..addresses.len()).filter(|index| loads[*index] < most).max_by_key(score).unwrap_or(0);
        if let Some(load) = loads.get_mut(best) {
            *load += 1;
        }
        best
    })
}

/// Which buckets have flows at another address than their new ones.
pub(super) struct Moved([bool; BUCKETS]);

impl Moved {
    /// None seen yet. None: no bucket of the family has flows at two addresses.
    pub(super) fn begin<F: Family>(config: &Config) -> Option<Self> {
        let unsettled = (0..BUCKETS).any(|bucket| !F::bucket(config, bucket).is_settled());
        unsettled.then_some(Self([false; BUCKETS]))
    }

    /// Takes note of a slot in use.
    pub(super) fn see<F: Family>(&mut self, config: &Config, slot: Slot, tuple: F::Tuple) {
        let bucket = F::hash(&config.key, tuple).bucket();
        self.0[bucket] |= slot.address() != F::bucket(config, bucket).now() as usize;
    }
}

impl Dataplane {
    /// How many SNAT addresses of a family the flow table has places for.
    fn room<F: Family>(&self) -> usize {
        let sets = self.tables.sets::<F>();
        sets / SETS_PER_ADDRESS as usize
    }

    /// Whether [`Dataplane::set_snat_addresses`] would take these.
    ///
    /// # Errors
    /// Why not.
    pub fn check_snat_addresses(&self, wanted: &[IpAddr]) -> Result<(), SnatError> {
        let config = self.settings();
        next_places(&config, [self.room::<V4>(), self.room::<V6>()], wanted).map(drop)
    }

    /// Lets new flows leave from these addresses; a family without any stays as it is. Flows of an address that is not among
    /// them live on, and it keeps its place until the last has ended: [`Reaped::left`](super::Reaped::left). Waits for two grace periods, 16 ms, where anything changes.
    ///
    /// # Errors
    /// When there is no room; then nothing has changed.
    pub fn set_snat_addresses(&mut self, wanted: &[IpAddr]) -> Result<(), DataplaneError> {
        let before = self.settings();
        let rooms = [self.room::<V4>(), self.room::<V6>()];
        let (next4, next6) = next_places(&before, rooms, wanted)?;
        let (now4, now6) = (Places::of::<V4>(&before, rooms[0]), Places::of::<V6>(&before, rooms[1]));
        self.snat_wanted = wanted.to_vec();
        if (&now4, &now6) == (&next4, &next6) {
            return Ok(());
        }
        for (places4, places6) in [(now4.before(&next4), now6.before(&next6)), (next4, next6)] {
            self.write_places(&places4, &places6);
            grace::wait().map_err(|source| DataplaneError::System { call: "membarrier", source })?;
        }
        Ok(())
    }

    /// The SNAT addresses that flows leave from, older ones too.
    pub fn snat_places(&self) -> Vec<IpAddr> {
        let config = self.settings();
        let places =
            [Places::of::<V4>(&config, self.room::<V4>()), Places::of::<V6>(&config, self.room::<V6>())];
        places.iter().flat_map(Places::addresses).flatten().collect()
    }

    /// Takes note of what a look through the flow table has found. Returns the addresses whose last flow has ended.
    pub(super) fn settle_snat_addresses(
        &mut self,
        moved: [Option<Moved>; 2],
    ) -> Result<Vec<IpAddr>, DataplaneError> {
        let config = self.settings();
        let [moved4, moved6] = moved.map(|moved| moved.map_or([false; BUCKETS], |moved| moved.0));
        let (now4, now6) =
            (Places::of::<V4>(&config, self.room::<V4>()), Places::of::<V6>(&config, self.room::<V6>()));
        let (mut places4, mut places6) = (now4.clone(), now6.clone());
        let mut left = places4.settle(&moved4, &self.snat_wanted);
        left.extend(places6.settle(&moved6, &self.snat_wanted));
        if (&now4, &now6) != (&places4, &places6) {
            self.write_places(&places4, &places6);
            // What could not move then may move now.
            let wanted = self.snat_wanted.clone();
            self.set_snat_addresses(&wanted)?;
        }
        Ok(left)
    }

    /// The addresses first, then who looks for them.
    fn write_places(&self, places4: &Places, places6: &Places) {
        let Some(classifier) = self.classifier.get(0) else { return };
        let mut config = self.settings();
        let (addresses4, addresses6) = (places4.addresses(), places6.addresses());
        (config.snat4_count, config.snat6_count) = (addresses4.len() as u32, addresses6.len() as u32);
        let word = |address: Option<&Option<IpAddr>>| address.copied().flatten().map_or([0; 2], words);
        config.snat4 = std::array::from_fn(|index| word(addresses4.get(index))[0] as u32);
        config.snat6 = std::array::from_fn(|index| word(addresses6.get(index)));
        (config.bucket4, config.bucket6) = (places4.buckets, places6.buckets);
        self.config.write(0, config);
        enter_all::<V4>(&classifier.snat4, &addresses4);
        enter_all::<V6>(&classifier.snat6, &addresses6);
    }
}

/// Both families with these addresses.
pub(super) fn next_places(
    config: &Config,
    [room4, room6]: [usize; 2],
    wanted: &[IpAddr],
) -> Result<(Places, Places), SnatError> {
    fn next<F: Family>(config: &Config, room: usize, wanted: &[IpAddr]) -> Result<Places, SnatError> {
        let ipv4 = F::NUMBER == family::IPV4;
        let wanted: Vec<_> = wanted.iter().filter(|address| address.is_ipv4() == ipv4).copied().collect();
        if room == 0 && !wanted.is_empty() {
            return Err(SnatError::NoFamily(if ipv4 { "IPv4" } else { "IPv6" }));
        }
        Places::of::<F>(config, room).with(&wanted)
    }
    Ok((next::<V4>(config, room4, wanted)?, next::<V6>(config, room6, wanted)?))
}

/// Writes where addresses are looked up. One that was there before and still is can be found all the time.
fn enter_all<F: Family>(places: &[Cell8; SNAT_PLACES], addresses: &[Option<IpAddr>]) {
    let entries: [Cell8; SNAT_PLACES] = std::array::from_fn(|_| Cell8::default());
    for (index, address) in addresses.iter().enumerate() {
        if let Some(address) = address {
            enter_snat(&entries, F::snat_place(words(*address)), index);
        }
    }
    for (place, entry) in places.iter().zip(&entries) {
        if place.load() != entry.load() {
            place.store(entry.load());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn ips(last: impl IntoIterator<Item = u8>) -> Vec<IpAddr> {
        last.into_iter().map(ip).collect()
    }

    /// How many buckets have new flows at each place.
    fn shares(places: &Places) -> Vec<usize> {
        let at = |index| places.buckets.iter().filter(|bucket| bucket.now() as usize == index).count();
        (0..places.addresses.len()).map(at).collect()
    }

    const NOBODY: [bool; BUCKETS] = [false; BUCKETS];

    #[test]
    fn buckets_are_dealt_out_evenly() {
        let places = Places::empty(8).with(&ips(1..=5)).unwrap();
        assert!(places.is_settled(), "nobody was there before");
        assert!(shares(&places)[..5].iter().all(|share| (48..=52).contains(share)), "{:?}", shares(&places));
        assert_eq!(shares(&places)[5..], [0; 3]);
    }

    #[test]
    fn another_address_takes_its_share_and_no_more() {
        let one = Places::empty(4).with(&ips([1])).unwrap();
        let two = one.with(&ips([1, 2])).unwrap();
        assert_eq!(shares(&two), [128, 128, 0, 0]);
        for (before, now) in one.buckets.iter().zip(&two.buckets) {
            assert_eq!(now.before(), before.now(), "flows are found where they were");
        }
        let mut settled = two.clone();
        assert_eq!(settled.settle(&NOBODY, &ips([1, 2])), ips([]), "both are in use");
        let three = settled.with(&ips([2, 1, 3])).unwrap();
        assert_eq!(
            three.addresses(),
            [Some(ip(1)), Some(ip(2)), Some(ip(3))],
            "who is there keeps the place"
        );
        let moved =
            settled.buckets.iter().zip(&three.buckets).filter(|(one, other)| one.now() != other.now());
        assert!((80..=130).contains(&moved.count()), "a third, and what bounds on the shares cost");
    }

    #[test]
    fn an_address_leaves_when_its_last_flow_has() {
        let two = Places::empty(2).with(&ips([1, 2])).unwrap();
        let mut one = two.with(&ips([2])).unwrap();
        assert_eq!((one.in_use(), one.unsettled()), (ips([2]), ips([1])));
        let mut moved = NOBODY;
        moved[one.buckets.iter().position(|bucket| !bucket.is_settled()).unwrap()] = true;
        assert_eq!(one.settle(&moved, &ips([2])), ips([]), "one flow is left");
        let error = one.with(&ips([2, 3])).unwrap_err();
        let expected = SnatError::NoPlace { address: ip(3), room: 2, leaving: ips([1]) };
        assert_eq!(error, expected);
        assert!(error.to_string().contains("10.0.0.1 has no new flows"), "{error}");
        assert_eq!(one.settle(&NOBODY, &ips([2])), ips([1]));
        let other = one.with(&ips([2, 3])).unwrap();
        assert_eq!(other.addresses(), [Some(ip(3)), Some(ip(2))], "in the place that became free");
    }

    #[test]
    fn a_change_can_be_taken_back_at_once() {
        let one = Places::empty(4).with(&ips([1])).unwrap();
        let two = one.with(&ips([1, 2])).unwrap();
        let mut back = two.with(&ips([1])).unwrap();
        assert_eq!(shares(&back), [256, 0, 0, 0]);
        for (there, here) in two.buckets.iter().zip(&back.buckets) {
            assert_eq!(
                here.before(),
                if there.now() == 1 { 1 } else { 0 },
                "also flows of the moment between"
            );
        }
        assert_eq!(back.settle(&NOBODY, &ips([1])), ips([2]));
    }

    #[test]
    fn nobody_is_looked_for_at_three_addresses() {
        let one = Places::empty(4).with(&ips([1])).unwrap();
        let two = one.with(&ips([2])).unwrap();
        assert_eq!(two.with(&ips([3])), Err(SnatError::Unsettled(ips([1]))));
        let three = Places::empty(4).with(&ips([1])).unwrap().with(&ips([1, 2])).unwrap();
        assert_eq!(three.with(&ips([3])), Err(SnatError::Unsettled(ips([1]))), "both are in use");
        // One of the two may stay: the third has to wait for its share.
        let mut three = two.with(&ips([2, 3])).unwrap();
        assert_eq!(shares(&three), [0, 256, 0, 0]);
        assert_eq!(three.settle(&NOBODY, &ips([2, 3])), ips([1]));
        assert_eq!(shares(&three.with(&ips([2, 3])).unwrap()), [0, 128, 128, 0]);
    }

    #[test]
    fn on_the_way_both_addresses_are_looked_at() {
        let one = Places::empty(4).with(&ips([1])).unwrap();
        let two = one.with(&ips([1, 2])).unwrap();
        let between = one.before(&two);
        assert_eq!(between.addresses, two.addresses);
        for (between, after) in between.buckets.iter().zip(&two.buckets) {
            assert_eq!(between.now(), 0, "new flows are not yet at the other");
            assert_eq!(between.before(), after.now(), "but would be found there");
        }
    }

    #[test]
    fn a_family_that_is_not_named_stays_as_it_is() {
        let one = Places::empty(4).with(&ips([1])).unwrap();
        assert_eq!(one.with(&[]), Ok(one.clone()));
    }

    #[test]
    fn addresses_at_the_same_place_are_found_one_after_the_other() {
        let places: [Cell8; SNAT_PLACES] = std::array::from_fn(|_| Cell8::default());
        let both = [Some(ip(1)), Some([10, 0, 0, 65].into())];
        let place = V4::snat_place(words(ip(1)));
        assert_eq!(place, V4::snat_place(words([10, 0, 0, 65].into())));
        enter_all::<V4>(&places, &both);
        assert_eq!(places[place].load(), lb_common::layout::SNAT_SHARED);
        enter_all::<V4>(&places, &[None, both[1]]);
        assert_eq!(places[place].load(), 2);
        enter_all::<V4>(&places, &[]);
        assert!(places.iter().all(|place| place.load() == 0));
    }
}
