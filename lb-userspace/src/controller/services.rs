//! The configured services, each under its number in the data path.

use std::ops::Index;

use super::roster::Roster;
use crate::config::{Config, Service};

/// Services in the order of the configuration file. Backends, selections and checks name them by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Services(Vec<(usize, Service)>);

impl Services {
    /// Those of a configuration, under the numbers that they have.
    pub(super) fn of(config: &Config, roster: &Roster) -> Self {
        let numbered = |service: &Service| Some((roster.service(&service.name)?, service.clone()));
        Self(config.services.iter().filter_map(numbered).collect())
    }

    /// Keeps those of `others` that are not here as well.
    pub(super) fn keep(&mut self, others: &Self) {
        let missing = others.0.iter().filter(|(number, _)| self.get(*number).is_none());
        self.0.extend(missing.cloned().collect::<Vec<_>>());
    }

    /// The service with a number.
    pub(super) fn get(&self, number: usize) -> Option<&Service> {
        self.iter().find(|(known, _)| *known == number).map(|(_, service)| service)
    }

    /// Each with its number.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Service)> {
        self.0.iter().map(|(number, service)| (*number, service))
    }

    /// Their numbers.
    pub(super) fn numbers(&self) -> Vec<usize> {
        self.0.iter().map(|(number, _)| *number).collect()
    }

    /// Whatever a service says, in a list by number; `default` where a number is nobody's.
    pub(super) fn by_number<T: Clone>(&self, default: T, pick: impl Fn(&Service) -> T) -> Vec<T> {
        let length = self.iter().map(|(number, _)| number + 1).max().unwrap_or_default();
        let mut list = vec![default; length];
        for (number, service) in self.iter() {
            list[number] = pick(service);
        }
        list
    }
}

impl Index<usize> for Services {
    type Output = Service;

    /// # Panics
    /// When there is no such number: a backend never outlives its service.
    fn index(&self, number: usize) -> &Service {
        self.get(number).expect("backends and selections belong to a service that is there")
    }
}
