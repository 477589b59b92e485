//! Resources that many stories begin with.

use std::fmt::Write;

/// A Service of port 80 with endpoints on these ports of this machine, which are called in plain. May stand behind others.
pub fn service(name: &str, ports: &[u16]) -> String {
    let mut text =
        format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n");
    for port in ports {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-{port}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        );
    }
    text
}
