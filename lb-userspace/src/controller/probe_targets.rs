//! Whom `admin.listen` may ask.

use std::sync::Arc;

use tokio::sync::watch;

use super::Controller;
use crate::{admin::ProbeTarget, config::CheckKind, health::Asker};

impl Controller {
    /// The backends as they are, now and after a reload, for [`crate::admin::ProbeListener::serve`].
    pub fn watch_probe_targets(&mut self) -> watch::Receiver<Vec<Arc<ProbeTarget>>> {
        self.probes.send_replace(self.probe_targets());
        self.probes.subscribe()
    }

    /// The backends as they are now.
    pub(super) fn probe_targets(&self) -> Vec<Arc<ProbeTarget>> {
        self.backends
            .iter()
            .map(|backend| {
                let service = &self.services[backend.target.service];
                let speaks_http = matches!(service.check.kind, CheckKind::Https | CheckKind::Http);
                let asker =
                    speaks_http.then(|| Asker::new(backend.address, backend.host.as_deref(), &service.check));
                Arc::new(ProbeTarget::new(&service.name, &backend.name, backend.local, asker))
            })
            .collect()
    }
}
