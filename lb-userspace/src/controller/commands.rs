//! What an operator orders about single backends.

use std::collections::BTreeMap;

use super::{
    Controller,
    backends::Backend,
    endings::{is_over, unix_seconds},
    orders::Order,
    services::Services,
};
use crate::{
    admin::{
        BackendChoice, Caller, JournalKind, Ordered, OrderedBackend, OrderedState, Refusal, RefusalKind,
        StateOrder, WeightOrder,
    },
    health::OperatorState,
};

/// As in the configuration.
const WEIGHT_MAX: u16 = 256;

impl Controller {
    /// `POST /v1/backends/state`
    pub(super) fn set_state(&mut self, order: &StateOrder, by: Caller) -> Result<Ordered, Refusal> {
        let (state, verb) = match order.state {
            OrderedState::Ready => (OperatorState::None, "handed back to its checks"),
            OrderedState::Drain => {
                (OperatorState::Drain, "drained: no new flows, unless there is nobody else")
            }
            OrderedState::Maint => (OperatorState::Maint, "put into maintenance: no new flows"),
        };
        if state == OperatorState::None && order.timeout_seconds.is_some() {
            let error = "a timeout is for drain and maint: a backend that is handed back keeps its flows";
            return Err(Refusal::new(RefusalKind::Usage, error));
        }
        let timeouts: BTreeMap<_, _> =
            self.services.iter().map(|(_, service)| (service.name.clone(), service.drain_timeout)).collect();
        let change = |kept: &mut Order| {
            let configured = timeouts.get(&kept.service).copied().flatten().map(|it| it.as_secs());
            let timeout = order.timeout_seconds.or(configured).filter(|_| state != OperatorState::None);
            kept.state = state;
            kept.reset_at = timeout.map(|seconds| unix_seconds().saturating_add(seconds));
        };
        self.order(&order.choice(), change, verb, by)
    }

    /// `POST /v1/backends/weight`
    pub(super) fn set_weight(&mut self, order: &WeightOrder, by: Caller) -> Result<Ordered, Refusal> {
        if let Some(weight) = order.weight.filter(|weight| *weight > WEIGHT_MAX) {
            let error = format!("{weight} is no weight: write 0 (no new flows) to {WEIGHT_MAX}");
            return Err(Refusal::new(RefusalKind::Usage, error));
        }
        let verb = match order.weight {
            Some(weight) => format!("given weight {weight}"),
            None => "given its configured weight back".to_owned(),
        };
        self.order(&order.choice(), |kept| kept.weight = order.weight, &verb, by)
    }

    /// Changes the orders about the chosen backends: on the disk first, then in the data path.
    fn order(
        &mut self,
        choice: &BackendChoice,
        change: impl Fn(&mut Order),
        verb: &str,
        by: Caller,
    ) -> Result<Ordered, Refusal> {
        let chosen = choose(&self.backends, &self.services, choice)?;
        let orders: Vec<_> = chosen
            .iter()
            .map(|index| {
                let backend = &self.backends[*index];
                let mut order =
                    self.orders.about(&self.services[backend.target.service].name, backend.address);
                order.host.clone_from(&backend.host);
                change(&mut order);
                order
            })
            .collect();
        self.orders
            .take(&orders)
            .map_err(|error| Refusal::new(RefusalKind::Failed, format!("nothing was changed: {error}")))?;
        for (index, order) in chosen.iter().zip(&orders) {
            let backend = &mut self.backends[*index];
            backend.obey(order);
            let id = backend.id;
            // Whoever is handed back, or has another time now, keeps what is left.
            if !is_over(order.reset_at) {
                self.spare_flows_of(id);
            }
            let backend = &self.backends[*index];
            let (name, service) = (backend.name.clone(), backend.target.service);
            let service_name = self.services[service].name.clone();
            tracing::info!("{service_name}/{name} was {verb}, by {by}");
            self.journal.note(
                JournalKind::Operator,
                Some((&service_name, &name)),
                format!("{service_name}/{name} was {verb}, by {by}"),
            );
            self.select(service, false);
            self.select(service, true);
        }
        self.reap();
        Ok(Ordered {
            backends: chosen.iter().map(|index| self.ordered(&self.backends[*index])).collect(),
            warnings: self.selection_warnings(&chosen),
        })
    }

    fn ordered(&self, backend: &Backend) -> OrderedBackend {
        OrderedBackend {
            service: self.services[backend.target.service].name.clone(),
            name: backend.name.clone(),
            address: backend.address,
            state: backend.shown_state(),
            weight: backend.weight,
            active_flows: self.reaped.active.get(usize::from(backend.id)).copied().unwrap_or_default(),
            reset_in_seconds: self.reset_in(backend),
        }
    }

    /// What the orders have left the services with, where that is not well.
    fn selection_warnings(&self, chosen: &[usize]) -> Vec<String> {
        let mut warnings = Vec::new();
        for backend in chosen.iter().map(|index| &self.backends[*index]) {
            let key = (backend.target.service, backend.address.is_ipv6());
            let Some(choice) = self.choices.get(&key) else { continue };
            let warning = choice
                .reason
                .explanation()
                .map(|why| format!("{}: {why}", self.services[backend.target.service].name));
            warnings.extend(warning.filter(|warning| !warnings.contains(warning)));
        }
        warnings
    }
}

/// The number of the service with a name, or what the operator may have meant.
pub(super) fn numbered(services: &Services, name: &str) -> Result<usize, Refusal> {
    let found = services.iter().find(|(_, service)| service.name == *name);
    found.map(|(number, _)| number).ok_or_else(|| {
        let names: Vec<_> = services.iter().map(|(_, service)| service.name.as_str()).collect();
        let error = format!("there is no service {name:?}; there is {}", names.join(", "));
        Refusal::new(RefusalKind::Usage, error)
    })
}

/// The places of the backends that a command is about, or what the operator may have meant.
pub(super) fn choose(
    backends: &[Backend],
    services: &Services,
    choice: &BackendChoice,
) -> Result<Vec<usize>, Refusal> {
    let usage = |error| Err(Refusal::new(RefusalKind::Usage, error));
    if let Some(name) = &choice.service {
        numbered(services, name)?;
    }
    let in_service = |backend: &Backend| {
        choice.service.as_ref().is_none_or(|name| services[backend.target.service].name == *name)
    };
    let found: Vec<_> = (0..backends.len())
        .filter(|index| in_service(&backends[*index]) && backends[*index].answers_to(&choice.backend))
        .collect();
    let full_name = |backend: &Backend| {
        let name = format!("{}/{}", services[backend.target.service].name, backend.name);
        if backend.name == backend.address.to_string() {
            name
        } else {
            format!("{name} ({})", backend.address)
        }
    };
    match found.len() {
        0 => {
            let names: Vec<_> = backends.iter().filter(|it| in_service(it)).map(full_name).collect();
            usage(format!("there is no backend {:?}; there is {}", choice.backend, names.join(", ")))
        }
        1 => Ok(found),
        _ if choice.all_services => Ok(found),
        _ => {
            let names: Vec<_> = found.iter().map(|index| full_name(&backends[*index])).collect();
            let error = format!(
                "{:?} may be any of {}: name the service, or all of them (--service NAME, --all-services)",
                choice.backend,
                names.join(", ")
            );
            usage(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{backends::enumerate, roster::Roster},
        *,
    };
    use crate::config::Config;

    fn two_services() -> (Vec<Backend>, Services) {
        let text = "[[service]]\nname = \"api\"\nlisten = [\"10.0.0.100:6443\"]\n\
                    [[service.backend]]\nname = \"master-1\"\naddress = \"10.0.0.1:6443\"\n\
                    [[service.backend]]\nname = \"master-2\"\naddress = \"10.0.0.2:6443\"\n\
                    [[service]]\nname = \"rke2\"\nlisten = [\"10.0.0.100:9345\"]\n\
                    [[service.backend]]\nname = \"master-1\"\naddress = \"10.0.0.1:9345\"\n";
        let config = Config::parse(text, "test.toml").unwrap().0;
        let roster = Roster::default().next(&config, |_| false).unwrap();
        (enumerate(&config, &roster).unwrap(), Services::of(&config, &roster))
    }

    fn chosen(backend: &str, service: Option<&str>, all_services: bool) -> Result<Vec<usize>, String> {
        let (backends, services) = two_services();
        let choice =
            BackendChoice { backend: backend.to_owned(), service: service.map(str::to_owned), all_services };
        choose(&backends, &services, &choice).map_err(|refusal| {
            assert_eq!(refusal.kind, RefusalKind::Usage);
            refusal.error
        })
    }

    #[test]
    fn a_backend_is_found_by_its_name_or_address() {
        assert_eq!(chosen("master-2", None, false), Ok(vec![1]));
        assert_eq!(chosen("10.0.0.1:9345", None, false), Ok(vec![2]));
        assert_eq!(chosen("master-1", Some("rke2"), false), Ok(vec![2]));
        assert_eq!(chosen("master-1", None, true), Ok(vec![0, 2]));
    }

    #[test]
    fn what_is_ambiguous_or_unknown_is_answered_with_what_there_is() {
        assert_eq!(
            chosen("master-1", None, false).unwrap_err(),
            "\"master-1\" may be any of api/master-1 (10.0.0.1:6443), rke2/master-1 (10.0.0.1:9345): \
             name the service, or all of them (--service NAME, --all-services)"
        );
        assert_eq!(
            chosen("master-9", Some("rke2"), false).unwrap_err(),
            "there is no backend \"master-9\"; there is rke2/master-1 (10.0.0.1:9345)"
        );
        assert_eq!(
            chosen("master-1", Some("etcd"), true).unwrap_err(),
            "there is no service \"etcd\"; there is api, rke2"
        );
    }
}
