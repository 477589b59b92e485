//! What holds for those who call, made ready for requests whenever the control plane says something new.

use std::sync::Arc;

use arc_swap::ArcSwap;
use sheetbend_control_plane_client::discovery::{Discovery, Snapshot};
use sheetbend_control_plane_client::model::InboundPolicy;

use crate::admission::Admission;
use crate::policy::authz::Authz;
use crate::policy::tokens::Tokens;

/// One thing that the control plane said, made ready.
pub(crate) struct InboundRules {
    source: Arc<InboundPolicy>,
    /// Who may call.
    pub(crate) authz: Authz,
    /// Whose tokens are believed.
    pub(crate) tokens: Tokens,
    /// How much of what they ask for passes.
    pub(crate) admission: Admission,
}

impl InboundRules {
    fn new(source: Arc<InboundPolicy>, former: &Admission) -> Self {
        let admission = Admission::new(&source.limits, former);
        let tokens = Tokens::new(&source.access.issuers);
        Self { authz: Authz::new(&source.access), tokens, admission, source }
    }

    /// What holds now; `None` before a control plane said so, and nobody is let in then.
    pub(crate) fn of(snapshot: &Snapshot) -> Option<Self> {
        snapshot.inbound().cloned().map(|source| Self::new(source, &Admission::default()))
    }
}

/// Keeps the rules as the control plane has them. Connections and requests see the change with their next look.
pub(crate) async fn follow(discovery: Discovery, rules: Arc<ArcSwap<InboundRules>>) {
    let mut changes = discovery.subscribe();
    loop {
        let said = changes.borrow_and_update().inbound().cloned();
        if let Some(policy) = said.filter(|policy| !Arc::ptr_eq(policy, &rules.load().source)) {
            let former = rules.load_full();
            rules.store(Arc::new(InboundRules::new(policy, &former.admission)));
            tracing::info!("who may call is said anew");
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
